"""Behaviours found in a text: contexts, vectors and clusters against brute force, and an interrupted search."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import adjusted_rand_score

import circuits.behaviours.find as find
from circuits.attribution.activations import Setting, capture_activations
from circuits.attribution.node_effects import attribute
from circuits.behaviours.clusters import cluster_vectors, project, ranked_clusters
from circuits.behaviours.contexts import read_contexts
from circuits.behaviours.options import BehaviourSearchOptions
from circuits.behaviours.representation import context_vectors
from sae._files import temporary_name
from sae.errors import UserError
from sae.model.tokens import Tokens

TEXTS = [
    "the king near the boys runs the dog",
    "the dogs see the men",
    " ",
    "the boy near the king sees a dog",
] * 3
OPTIONS = BehaviourSearchOptions(
    surprise=20, contexts=24, context_length=8, clusters=4, circuits=2, examples=4, nodes=5, dimensions=6
)


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_saes):
    return Setting.of(tiny_model, tiny_saes, "log_probability")


@pytest.fixture(scope="module")
def contexts(setting):
    return read_contexts(setting.model, TEXTS, OPTIONS)


def test_contexts_are_tokens_of_the_text_with_their_surprise(setting, contexts):
    model, texts = setting.model, [text for text in TEXTS if text.strip()]
    rows = [model.tokenize([text]).input_ids[0].tolist() for text in texts]
    assert len(contexts) == 24 and contexts.n_below == contexts.n_tokens
    answers = contexts.prompts.clean_answers.tolist()
    for i in (0, 5, 23):
        ids, end = rows[contexts.document[i]], contexts.position[i]
        assert ids[end] == answers[i] and contexts.prompts.texts[i].split() == texts[contexts.document[i]].split()[:end]
        logits = model.run(Tokens.from_rows([ids[:end]])).logits[0, -1]
        assert contexts.surprise[i] == pytest.approx(-logits.log_softmax(-1)[answers[i]].item(), abs=1e-4)
    with pytest.raises(UserError, match="none of"):
        read_contexts(model, TEXTS, BehaviourSearchOptions(surprise=1e-9))


def test_vectors_are_effects_of_single_contexts(setting, contexts):
    vectors = context_vectors(setting, contexts.prompts, OPTIONS, progress=False)
    assert np.allclose(np.asarray(vectors.multiply(vectors).sum(1)), 1)
    one = contexts.prompts[7]
    effects = attribute(capture_activations(setting, one, gradient=True), method="attrib", totals=False).effects
    expected, start, last = np.zeros(vectors.shape[1]), 0, int(one.clean.lengths[0]) - 1
    for of_site in effects.values():
        for position, feature, value in zip(of_site.position, of_site.feature, of_site.value, strict=True):
            if feature < of_site.n_features:
                expected[start + int(feature) + of_site.n_features * int(position == last)] += float(value)
        start += 2 * of_site.n_features
    expected = np.sqrt(expected.clip(min=0))
    assert np.allclose(vectors[7].toarray()[0], expected / np.linalg.norm(expected), atol=1e-4)
    widths = sum(setting.model.widths[site] for site in setting.saes)
    for represent, width in (("activations", vectors.shape[1]), ("gradients", widths)):
        options = BehaviourSearchOptions(represent=represent)
        assert context_vectors(setting, contexts.prompts, options, progress=False).shape == (24, width)


@pytest.mark.parametrize("cluster", ["agglomerative", "spectral", "kmeans"])
@pytest.mark.parametrize("by", ["svd", "random"])
def test_planted_clusters_are_found(cluster, by):
    generator = np.random.default_rng(0)
    planted = np.repeat([0, 1, 2], [60, 30, 10])
    vectors = np.zeros((100, 60))
    vectors[np.arange(100)[:, None], 20 * planted[:, None] + np.arange(20)] = 1 + 0.3 * generator.random((100, 20))
    options = BehaviourSearchOptions(cluster=cluster, project=by, clusters=3, dimensions=30)
    z = project(sp.csr_matrix(vectors), options)
    labels = cluster_vectors(z, options)
    assert all(len(set(labels[planted == group])) == 1 for group in range(3)) and len(set(labels)) == 3
    clusters = ranked_clusters(z, labels, [f"w{group}" for group in planted])
    assert sorted(len(one.members) for one in clusters) == [10, 30, 60] and clusters[0].answer_purity == 1
    for one in clusters:
        inside = z[one.members]
        assert one.purity == pytest.approx((inside @ inside.T).mean())
        assert one.score == pytest.approx(one.purity * np.log2(len(one.members)))
    (together,) = ranked_clusters(z, np.zeros(100, dtype=np.int64), ["a"] * 30 + ["b"] * 70)
    assert together.answers == [("b", 70), ("a", 30)] and together.answer_purity == 0.7


@pytest.mark.slow
def test_an_interrupted_search_ends_the_same(setting, tmp_path, monkeypatch):
    model, saes = setting.model, setting.saes
    whole = find.find_behaviours(model, saes, TEXTS, OPTIONS, out=tmp_path / "whole", progress=False)
    assert sorted(whole.labels) == sorted(rank for one in whole.clusters for rank in [one.rank] * len(one.members))
    assert whole.agreement(whole.answers) <= 1 == whole.agreement([str(label) for label in whole.labels])
    done, discover = [], find.discover

    def once(*arguments, **options):
        if done:
            raise KeyboardInterrupt
        done.append(1)
        return discover(*arguments, **options)

    monkeypatch.setattr(find, "discover", once)
    with pytest.raises(KeyboardInterrupt):
        find.find_behaviours(model, saes, TEXTS, OPTIONS, out=tmp_path / "killed", progress=False)
    monkeypatch.setattr(find, "discover", discover)
    left = temporary_name(tmp_path / "killed" / "cluster_01" / "prompts.jsonl")
    left.write_text("half a line")
    monkeypatch.setattr("circuits.behaviours.representation.capture_activations", lambda *a, **k: pytest.fail("again"))
    resumed = find.find_behaviours(model, saes, TEXTS, OPTIONS, out=tmp_path / "killed", resume=True, progress=False)
    assert resumed.to_dict() == whole.to_dict() and not left.exists()
    for rank, circuit in whole.circuits.items():
        assert circuit.nodes_frame().equals(resumed.circuits[rank].nodes_frame())
        assert (
            circuit.metadata["examples"] == circuit.metadata["n_examples"] == 4 < len(whole.clusters[rank - 1].members)
        )
    folder = tmp_path / "killed"
    assert 'href="cluster_01/graph/circuit.html"' in resumed.write_page(folder).read_text()
    assert (folder / "cluster_02" / "graph" / "circuit.html").is_file()
    lines = (folder / "cluster_01" / "prompts.jsonl").read_text().splitlines()
    assert {*json.loads(lines[0])} == {"clean_prefix", "clean_answer"}
    fewer = find.find_behaviours(
        model, saes, TEXTS, replace(OPTIONS, nodes=3), out=folder, resume=True, progress=False
    )  # fmt: skip
    assert {circuit.metadata["options"]["edge_nodes"] for circuit in fewer.circuits.values()} == {3}
    (folder / "cluster_02" / "notes.txt").write_text("mine")
    one = replace(OPTIONS, circuits=1)
    find.find_behaviours(model, saes, TEXTS, one, out=folder, resume=True, progress=False)
    assert (folder / "cluster_01" / "circuit" / "circuit.json").is_file()
    assert [path.name for path in (folder / "cluster_02").iterdir() if path.name != "graph"] == ["notes.txt"]


def test_clusters_are_those_of_average_linkage():
    """Against scipy's, on vectors where other linkages give other clusters."""
    z = np.random.default_rng(1).normal(size=(40, 4))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    ours = cluster_vectors(z, BehaviourSearchOptions(clusters=5, cluster="agglomerative"))
    agreement = {
        method: adjusted_rand_score(ours, fcluster(linkage(z, method, metric="cosine"), 5, criterion="maxclust"))
        for method in ("average", "single", "complete")
    }
    assert agreement["average"] == pytest.approx(1) and max(agreement["single"], agreement["complete"]) < 0.99
    alike = cluster_vectors(z, BehaviourSearchOptions(likeness=0.25))
    assert (alike == cluster_vectors(z, BehaviourSearchOptions())).all()
    assert len(set(cluster_vectors(z, BehaviourSearchOptions(represent="activations")))) == 20
    cut = fcluster(linkage(z, "average", metric="cosine"), 0.75, criterion="distance")
    assert adjusted_rand_score(alike, cut) == pytest.approx(1) and 1 < len(set(alike)) < 40
    with pytest.raises(UserError, match="agglomerative"):
        BehaviourSearchOptions(likeness=0.25, cluster="kmeans")
    with pytest.raises(UserError, match="one of them"):
        BehaviourSearchOptions(likeness=0.25, clusters=3)


@pytest.mark.parametrize(("clusters", "least", "most"), [(5, 5, 5), (12, 10, 12), (40, 13, 40), (None, 2, 12)])
def test_more_contexts_than_average_linkage_takes(monkeypatch, clusters, least, most):
    """Also where linkage has no more centres to join than there are to be clusters; k-means may leave some empty."""
    monkeypatch.setattr("circuits.behaviours.clusters.MOST", 50)
    monkeypatch.setattr("circuits.behaviours.clusters.CENTRES", 12)
    z = np.random.default_rng(0).normal(size=(60, 8))
    labels = cluster_vectors(z / np.linalg.norm(z, axis=1, keepdims=True), replace(OPTIONS, clusters=clusters))
    assert len(labels) == 60 and least <= len(set(labels.tolist())) <= most
