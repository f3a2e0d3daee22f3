"""A circuit of autoencoders and transcoders, from discovery to edits: everything that takes dictionaries takes both."""

from __future__ import annotations

import pytest
import torch

from circuits import Circuit, ablate, discover, faithfulness, learn_mask
from circuits.attribution.nodes import ranked
from circuits.editing.applied import FeatureEdits
from circuits.editing.declaration import Edit
from circuits.editing.trial import EditOptions
from circuits.faithfulness.edges import edge_faithfulness
from circuits.options import DiscoverOptions, FaithfulnessOptions, MaskOptions
from graphs.drawing.dot import to_svg
from graphs.feature_graph import FeatureGraph
from graphs.formats.neuronpedia import to_neuronpedia
from sae.features.contexts import top_contexts
from sae.features.pages import feature_pages
from sae.model.sites import Site
from tests.circuits.attribution.test_transcoders import mixed
from tests.near import assert_near

MLP_1, READ_1 = Site("mlp", 1), Site("mlp_in", 1)
TEXTS = ["the man near the old dogs runs", "she sees the young king and he likes her", "they know the queens"]


@pytest.fixture(scope="module")
def model(make_tiny_model):
    return make_tiny_model("gpt2")


@pytest.fixture(scope="module")
def circuit(model, make_saes, tiny_prompts):
    saes = mixed(model, make_saes)
    options = DiscoverOptions(method="attrib", edge_nodes=60)
    return discover(model, saes, tiny_prompts, options, progress=False)


@pytest.mark.slow
def test_skip_connections_are_nodes_that_survive_the_file(circuit, tmp_path):
    graph = circuit.graph(nodes=60)
    kinds = {node.kind for node in graph.nodes()}
    assert kinds == {"feature", "error", "skip", "metric"} and "mlp_1/skip" in graph
    assert any(edge.target == "mlp_1/skip" for edge in graph.edges())
    assert FeatureGraph.from_json(graph.to_json()).node("mlp_1/skip").kind == "skip"
    assert "skip connection" in to_svg(graph, nodes=60)
    skips = [node for node in to_neuronpedia(graph)["nodes"] if "/skip" in node["clerp"]]
    assert len(skips) == sum(node.kind == "skip" for node in graph.nodes())
    circuit.save(tmp_path / "circuit", graph=graph)
    again = Circuit.load(tmp_path / "circuit")
    for site, nodes in circuit.nodes.items():
        assert torch.equal(again.nodes[site].feature, nodes.feature)
        assert_near(again.nodes[site].effect, nodes.effect)
    shares, total = circuit.metadata["skips"], circuit.metadata["total_effect"]
    effects = {name: effect for name, effect in ranked(circuit.nodes) if name.endswith("/skip")}
    assert {f"{site}/skip": share * abs(total) for site, share in shares["sites"].items()} == pytest.approx(
        effects, rel=1e-3
    )
    assert "through skip connections: " in circuit.text()
    frame = circuit.nodes_frame().set_index("node")
    assert frame.feature.isna()["mlp_1/skip"] and not frame.feature.isna().all()


@pytest.mark.parametrize("ablation", ["mean", "counterfactual"])
def test_all_nodes_are_the_model_and_edges_add_up_to_nodes(circuit, ablation):
    """With every node kept, errors and skip connections among them, nothing is ablated."""
    options = FaithfulnessOptions(ablation=ablation, random=0, resamples=0)
    whole = faithfulness(circuit, options=options, sizes=(20,), progress=False)
    assert whole.faithfulness[-1] == pytest.approx(1.0, abs=1e-4)
    if ablation == "mean":
        few = faithfulness(circuit, options=options, sizes=(60,), progress=False)
        edges = edge_faithfulness(circuit, options=options, sizes=(50,), progress=False)
        assert edges.all_joined == pytest.approx(few.faithfulness[0], abs=1e-3)


def test_masks_gate_skip_connections_as_any_node(circuit):
    mask = learn_mask(circuit, options=MaskOptions(steps=3, ablation="optimal"), progress=False)
    assert sum(map(len, mask.nodes.values())) == sum(map(len, circuit.nodes.values()))
    assert all(torch.isfinite(scores).all() for scores in mask.scores.values())


def test_a_transcoders_feature_is_edited_where_it_writes(circuit, model):
    """In runs and in generation: the feature from what it reads, the change along its direction."""
    sae, tokens = circuit.saes[MLP_1], circuit.prompts.clean
    plain = model.run(tokens, capture=[MLP_1, READ_1])
    f = sae.encode(plain.activations[READ_1])
    feature = int(f.sum((0, 1)).argmax())
    edits = FeatureEdits(model, circuit.saes, [Edit([f"mlp_1/{feature}"], "zero")])
    with model.edited(edits.standing()):
        edited = model.run(tokens, capture=[MLP_1]).activations[MLP_1]
        again = model.run(tokens, capture=[MLP_1], skip={Site("attn", 0): torch.zeros_like(edited)})
        generated = [model.generate(tokens, max_new_tokens=3, use_cache=cache) for cache in (True, False)]
    assert_near(edited, plain.activations[MLP_1] - f[..., feature, None] * sae.W_dec[feature])
    assert not torch.allclose(again.activations[MLP_1], edited) and torch.equal(*generated)
    options = EditOptions(n_random=1, generate=1, new_tokens=2)
    report = ablate([f"mlp_1/{feature}"], circuit=circuit, options=options, operation="zero")
    assert report.features == [f"mlp_1/{feature}"]


def test_contexts_and_pages_are_of_what_is_read(circuit, model):
    sae = circuit.saes[MLP_1]
    tokens = model.tokenize(TEXTS)
    counted = tokens.attention_mask.bool() & (tokens.input_ids != model.tokenizer.bos_token_id)
    f = sae.encode(model.run(tokens, capture=[READ_1]).activations[READ_1])[counted]
    feature = int(f.amax(0).argmax())
    summary = top_contexts(model, circuit.saes, TEXTS, {MLP_1: [feature]})[MLP_1, feature]
    assert summary.max_activation == pytest.approx(float(f[:, feature].max()), rel=1e-4)
    pages = feature_pages(model, circuit.saes, TEXTS, {MLP_1: [feature]})
    assert pages[f"mlp_1/{feature}"].max_activation == pytest.approx(summary.max_activation, rel=1e-4)
