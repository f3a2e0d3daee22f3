"""Circuits compared: a permuted dictionary is the same mechanism, and statistics agree with loops over names."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from circuits import compare_circuits, discover
from circuits.attribution.nodes import SiteNodes
from circuits.comparison import partners as matching
from circuits.comparison.circuit_results import Transfer
from circuits.comparison.circuits import verdict
from circuits.comparison.options import CompareCircuitsOptions
from circuits.comparison.overlap import (
    ERROR,
    METRIC,
    OTHERS,
    SKIP,
    Names,
    Profile,
    _tested,
    measure_overlap,
    own_number,
    profile,
)
from circuits.comparison.partners import find_partners
from circuits.comparison.union import named_graph
from graphs.explorer import unpacked
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.sites import Site
from sae.saes import SAEs

OPTIONS = CompareCircuitsOptions(nodes=40, shuffles=99)


def renumbered(sae: SparseAutoencoder, order: torch.Tensor) -> SparseAutoencoder:
    """The same autoencoder with feature order[i] called i."""
    tensors = {name: x[order] if name in ("W_enc", "b_enc", "W_dec") else x for name, x in sae.named_buffers()}
    return SparseAutoencoder(sae.config, tensors)


@pytest.fixture(scope="module")
def orders(tiny_saes):
    generator = torch.Generator().manual_seed(3)
    return {site: torch.randperm(sae.config.n_features, generator=generator) for site, sae in tiny_saes.items()}


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    return discover(tiny_model, tiny_saes, tiny_prompts, method="attrib", edge_nodes=40, progress=False)


@pytest.fixture(scope="module")
def other_seed(tiny_model, tiny_saes, tiny_prompts, orders):
    saes = SAEs({site: renumbered(sae, orders[site]) for site, sae in tiny_saes.items()})
    return discover(tiny_model, saes, tiny_prompts, method="attrib", edge_nodes=40, progress=False)


@pytest.mark.slow
def test_features_of_one_dictionary_are_themselves_whatever_the_other_sites(
    tiny_model, tiny_saes, circuit, tiny_prompts
):
    """Circuits over other sites have other fingerprints; no feature is taken for one that is like it."""
    fewer = discover(
        tiny_model, tiny_saes, tiny_prompts[:3], method="attrib", sites="resid", edge_nodes=0, progress=False
    )
    partners, similarity = find_partners(circuit, fewer, prompts=8)
    assert similarity is None and set(partners) == set(fewer.nodes)
    for site, pairs in partners.items():
        features = {*circuit.nodes[site].feature.tolist(), *fewer.nodes[site].feature.tolist()} - {48}
        assert pairs == {feature: feature for feature in features}
    pair = compare_circuits(circuit, fewer, options=OPTIONS, progress=False).pairs[0]
    assert pair.matched is None and pair.there.translated is None


@pytest.mark.slow
def test_a_permuted_dictionary_has_the_same_mechanism(circuit, other_seed, orders, tmp_path):
    partners, similarity = find_partners(circuit, other_seed, prompts=8)
    assert similarity == pytest.approx(1, abs=1e-5)
    assert all(orders[site][j] == i for site, pairs in partners.items() for j, i in pairs.items())
    comparison = compare_circuits(circuit, other_seed, options=OPTIONS, names=("one", "two"), progress=False)
    pair = comparison.pairs[0]
    assert pair.matched == 1 and pair.overlap.shared >= 39  # ties in effects
    assert pair.overlap.nodes.value == pytest.approx(1, abs=0.02) and pair.overlap.nodes.p == 0.01
    assert pair.overlap.edges.value > 0.95 and pair.overlap.pearson.value > 0.999
    for transfer in (pair.there, pair.back):
        assert transfer.translated == pytest.approx(transfer.own, abs=0.05)
    page = pair.picture(tmp_path / "pair.html")
    union = unpacked(page.read_text())
    assert len(union["comparison"]["only_nodes"]) <= 2 and union["comparison"]["title"] == "two"
    assert pair.sentence in comparison.text() and comparison.to_frame().loc[0, "nodes"] == pair.overlap.nodes.value
    assert comparison.save(tmp_path / "pair.json").is_file() and "<svg" in comparison._repr_html_()


def test_partners_weigh_by_their_effect_over_all_spans(monkeypatch):
    """Feature 0 has effects 3 and 1 at two spans, feature 1 has 1; their partners are alike by 1 and by 0.5."""
    site, columns = Site("resid", 0), (torch.tensor([0, 1, 0]), torch.tensor([0, 0, 1]), torch.tensor([3.0, 1.0, -1.0]))
    saes = type("Saes", (dict,), {"device": torch.device("cpu")})({site: SimpleNamespace(W_dec=torch.eye(2))})
    circuit = SimpleNamespace(
        nodes={site: SiteNodes(2, *columns, ("a", "b"))}, metadata={}, saes=saes, model=SimpleNamespace(vocab_size=1)
    )
    monkeypatch.setattr(matching, "_correlations", lambda *_: {site: torch.diag(torch.tensor([1.0, 0.0]))})
    partners, similarity = find_partners(circuit, circuit, prompts=1)
    assert partners == {site: {0: 0, 1: 1}} and similarity == pytest.approx((4 * 1 + 1 * 0.5) / 5)


def test_overlap_agrees_with_loops_over_names():
    generator = np.random.default_rng(0)
    nodes = [("resid_0", f, span) for f in (*range(6), ERROR) for span in ("a", "b")]
    profiles = []
    for _ in range(2):
        effects = {name: generator.normal() for name in nodes if generator.random() < 0.7}
        edges = {(name, METRIC): effect for name, effect in effects.items()}
        profiles.append(Profile(effects, edges))
    overlap = measure_overlap(*profiles, n=5, shuffles=200, seed=0)
    top = [dict(sorted(one.effects.items(), key=lambda x: -abs(x[1]))[:5]) for one in profiles]
    w, v = ({name: abs(e) / sum(map(abs, of.values())) for name, e in of.items()} for of in top)
    union = {*w, *v}
    smaller, larger = (sum(f(w.get(name, 0), v.get(name, 0)) for name in union) for f in (min, max))
    assert overlap.nodes.value == pytest.approx(smaller / larger) and overlap.shared == len({*w} & {*v})
    x, y = ([one.effects.get(name, 0) for name in union] for one in profiles)
    assert overlap.pearson.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    weights = [{e: abs(x) / sum(map(abs, one.edges.values())) for e, x in one.edges.items()} for one in profiles]
    both = {*weights[0], *weights[1]}
    smaller, larger = (sum(f(weights[0].get(e, 0), weights[1].get(e, 0)) for e in both) for f in (min, max))
    assert overlap.edges.value == pytest.approx(smaller / larger)
    assert 0 < overlap.nodes.p <= 1


def test_shuffles_keep_sites_spans_and_errors():
    effects = {(site, f, span): 1.0 for site in ("embed", "mlp_0") for f in (*range(4), ERROR) for span in "ab"}
    names = Names([Profile(effects, {})])
    new = names.shuffled(np.random.default_rng(1))
    moved = {name: list(names.number)[new[index]] for name, index in names.number.items()}
    assert sorted(new) == list(range(len(names))) and any(name != to for name, to in moved.items())
    for (site, feature, span), to in moved.items():
        assert to[0] == site and to[2] == span and (feature != ERROR or to[1] == ERROR)
        if site != "metric" and feature != ERROR:
            assert to[1] == moved[site, feature, "a"][1]  # the same feature at every span


def test_a_shuffle_that_reaches_the_value_counts():
    tested = _tested([1.0, 1.0, 0.5, 0.0])
    assert (tested.value, tested.chance, tested.p) == (1.0, 0.5, 2 / 4)


def test_verdicts():
    carries, fails = Transfer(0.9, 1.0, None), Transfer(0.1, 1.0, None)
    assert verdict(0.01, carries, carries) == "same"
    assert verdict(0.01, carries, fails) == "partly"
    assert verdict(0.01, fails, fails) == verdict(0.5, carries, carries) == "different"
    assert verdict(None, carries, carries) == verdict(0.01, None, None) == "unknown"


def test_circuits_without_a_common_site_are_refused(tiny_model, tiny_saes, tiny_prompts, circuit):
    some = discover(tiny_model, tiny_saes, tiny_prompts, method="attrib", edge_nodes=0, sites="mlp_0", progress=False)
    rest = discover(tiny_model, tiny_saes, tiny_prompts, method="attrib", edge_nodes=0, sites="resid", progress=False)
    with pytest.raises(UserError, match="share no site"):
        compare_circuits(some, rest, progress=False)
    without = CompareCircuitsOptions(nodes=20, shuffles=0, transfer=False)
    pair = compare_circuits(circuit, some, options=without, progress=False).pairs[0]
    assert pair.verdict == "unknown" and pair.overlap.edges is None and pair.there is None


def test_nodes_go_by_site_feature_and_span_errors_and_skips_by_what_they_are():
    """With partners a feature without one has a name of its own, and is drawn beyond those of the first circuit."""
    site, n_features = Site.parse("mlp_1"), 8
    feature, position = torch.tensor([3, 3, 5, n_features, n_features + 1]), torch.tensor([0, 1, 1, 1, 1])
    nodes = {site: SiteNodes(n_features, feature, position, torch.tensor([5.0, 4, 3, 2, 1]), ("first", "rest"))}
    circuit = SimpleNamespace(edge_nodes=nodes, edges={}, features={}, metadata={})
    circuit.edges[site, None] = torch.tensor([[1.0, -5.0, 2.0, -0.5, -3.0]])
    strongest = profile(circuit, nodes, n_edges=2).edges
    assert strongest == {(("mlp_1", 3, "rest"), METRIC): -5.0, (("mlp_1", SKIP, "rest"), METRIC): -3.0}
    plain = profile(circuit, nodes, n_edges=0).effects
    of_others = [("mlp_1", ERROR, "rest"), ("mlp_1", SKIP, "rest")]
    assert list(plain) == [("mlp_1", 3, "first"), ("mlp_1", 3, "rest"), ("mlp_1", 5, "rest"), *of_others]
    paired = profile(circuit, nodes, n_edges=0, partners={site: {3: 6}})
    assert [name[1] for name in paired.effects] == [6, 6, own_number(5), ERROR, SKIP] and own_number(5) < min(OTHERS)
    graph = named_graph(
        circuit, paired, sites=["mlp_1"], title="two", widths={"mlp_1": n_features}, partners={site: {3: 6}}
    )
    assert [node.id for node in graph.nodes() if node.kind != "metric"] == [
        "mlp_1/6@first", "mlp_1/6@rest", "mlp_1/13@rest", "mlp_1/error@rest", "mlp_1/skip@rest",
    ]  # fmt: skip
    moved = Names([paired]).shuffled(np.random.default_rng(0))
    assert all(moved[number] == number for name, number in Names([paired]).number.items() if name[1] in OTHERS)
