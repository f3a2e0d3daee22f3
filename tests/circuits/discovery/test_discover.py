"""The pipeline: batching, aggregation, totals, files; and its answer to what it cannot use."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from circuits.attribution.nodes import count
from circuits.circuit import Circuit
from circuits.discovery.batching import max_rows
from circuits.discovery.discover import discover
from circuits.metrics.metrics import last_logits, logit_difference
from circuits.metrics.probe import save_probe
from circuits.options import DiscoverOptions
from graphs.feature_graph import FeatureGraph
from sae.errors import UserError
from sae.model.load import load_model
from sae.model.sites import Site
from tests.near import assert_near


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    return discover(tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(edge_nodes=40), progress=False)


def test_total_effect_and_completeness(circuit, tiny_model, tiny_prompts):
    meta = circuit.metadata
    m_clean = logit_difference(last_logits(tiny_model, tiny_prompts), tiny_prompts).mean().item()
    assert meta["m_clean"] == pytest.approx(m_clean, abs=1e-5)
    assert meta["total_effect"] == pytest.approx(meta["m_patch"] - meta["m_clean"])
    embed = meta["completeness"]["sites"]["embed"]
    assert embed["measured"] == pytest.approx(meta["total_effect"], abs=1e-5)
    for site, entry in meta["completeness"]["sites"].items():
        effects = next(found for key, found in circuit.effects.items() if key.name == site)
        assert entry["sum_of_effects"] == pytest.approx(effects.value.sum().item() / 8, abs=1e-5)
    assert meta["completeness"]["mean_residual"] < 0.02


@pytest.mark.slow
def test_batches_change_nothing(tiny_model, tiny_saes, tiny_prompts):
    """A budget for one prompt at a time gives the same effects and edges; prompts keep their numbers."""
    options = DiscoverOptions(edge_nodes=40, steps=2, sites="embed,resid,mlp_1")
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    memory = 1.5 * 2 / max_rows(tiny_model, tiny_prompts.clean.n_positions, memory=2.0)
    assert max_rows(tiny_model, tiny_prompts.clean.n_positions, memory=memory) == 1
    small = discover(tiny_model, tiny_saes, tiny_prompts, replace(options, memory=memory), progress=False)
    for site, nodes in circuit.nodes.items():
        assert_near(nodes.effect, small.nodes[site].effect, msg=site)
        of_prompts = circuit.effects[site].per_example(8)
        assert torch.allclose(of_prompts, small.effects[site].per_example(8), atol=1e-4)
    for pair, weights in circuit.edges.items():
        assert torch.allclose(weights.sort().values, small.edges[pair].sort().values, atol=1e-4), pair


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ig", "attrib"])
def test_edges_are_the_same_where_nothing_was_kept(tiny_model, tiny_saes, tiny_prompts, method, monkeypatch):
    """What the node pass keeps for the edges is left out where the memory budget is used up."""
    options = DiscoverOptions(method=method, edge_nodes=40, steps=2)
    kept = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    monkeypatch.setattr("circuits.attribution.node_effects.Attribution.n_bytes_for_edges", 2**40)
    again = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    assert kept.edges.keys() == again.edges.keys()
    for pair, weights in kept.edges.items():
        assert_near(weights, again.edges[pair], msg=pair)


def test_graph_has_the_strongest_nodes_and_their_edges(circuit):
    graph = circuit.graph(nodes=20, edges=30)
    assert len(graph) == 21 and graph.graph.number_of_edges() == 30
    shown = {node.id: node.effect for node in graph.nodes() if node.kind != "metric"}
    magnitudes = torch.cat([nodes.effect.abs() for nodes in circuit.nodes.values()]).sort(descending=True).values
    assert min(map(abs, shown.values())) == pytest.approx(magnitudes[19].item())
    assert graph.node("metric").effect == pytest.approx(circuit.metadata["total_effect"])
    last = [edge for edge in graph.edges() if edge.target == "metric"]
    assert last and all(edge.weight == pytest.approx(shown[edge.source], abs=1e-5) for edge in last)


@pytest.mark.slow
def test_prompts_of_a_circuit_do_for_another_metric_and_model(
    tiny_model, tiny_saes, make_tiny_model, tiny_prompts, tmp_path
):
    """`kl` compares with the clean run of the model at hand, the margin of a probe with its own answers."""
    weight = torch.randn(32, generator=torch.Generator().manual_seed(0))
    probe = save_probe(tmp_path / "p.safetensors", weight, torch.tensor(0.1), site=Site("resid", 1))

    def measured(model, prompts, metric: str):
        options = DiscoverOptions(method="attrib", metric=metric, edge_nodes=0, sites="resid_1")
        found = discover(model, tiny_saes, prompts, options, progress=False)
        return found.prompts, found.metadata["m_patch"]

    of_kl, of_margin = (measured(tiny_model, tiny_prompts, name) for name in ("kl", f"probe-margin:{probe}"))
    assert measured(tiny_model, of_margin[0], "kl")[1] == pytest.approx(of_kl[1])
    assert measured(tiny_model, of_kl[0], f"probe-margin:{probe}")[1] == pytest.approx(of_margin[1])
    other = make_tiny_model("gpt_neox", seed=3)
    assert measured(other, of_kl[0], "kl")[1] == pytest.approx(measured(other, tiny_prompts, "kl")[1])


def test_more_nodes_than_have_edges_are_refused(circuit):
    with pytest.raises(UserError, match="40 strongest"):
        circuit.graph(nodes=60)


def test_save_and_load(circuit, tmp_path):
    circuit.save(tmp_path / "circuit", graph=circuit.graph(nodes=20))
    assert sorted(path.name for path in (tmp_path / "circuit").iterdir()) == ["circuit.json", "effects.safetensors"]
    again = Circuit.load(tmp_path)
    assert again.metadata == json.loads(json.dumps(circuit.metadata))
    assert again.edges.keys() == circuit.edges.keys()
    assert again.graph(nodes=25).to_json() == circuit.graph(nodes=25).to_json()
    assert FeatureGraph.load(tmp_path / "circuit" / "circuit.json").to_json() == circuit.graph(nodes=20).to_json()
    with pytest.raises(UserError, match=r"effects\.safetensors"):
        Circuit.load(tmp_path / "nowhere")


@pytest.mark.slow
def test_models_without_a_tokenizer_will_do(circuit, tiny_model, tiny_saes, tiny_prompts, tmp_path):
    bare = load_model(tiny_model.hf, device="cpu", check=False)
    again = discover(bare, tiny_saes, tiny_prompts, DiscoverOptions(edge_nodes=40), progress=False)
    assert again.strongest_features(10) == circuit.strongest_features(10)
    assert all(pair["clean_answer"].startswith("#") for pair in again.metadata["example_pairs"])
    assert again.text() and Circuit.load(again.save(tmp_path / "circuit")).nodes_frame().equals(again.nodes_frame())
    by_position = discover(
        bare,
        tiny_saes,
        tiny_prompts[tiny_prompts.clean.lengths == 7],
        DiscoverOptions(edge_nodes=0, aggregation="position"),
        progress=False,
    )
    assert by_position.metadata["tokens"][0].startswith("#")


def test_a_metric_that_is_flat_at_the_clean_run_is_told_of(tiny_model, tiny_saes, tiny_prompts, caplog):
    """The gradient of KL from the clean run is zero at the clean run, so that first-order effects are rounding."""
    for method, flat in (("attrib", True), ("ig", False)):
        caplog.clear()
        discover(tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method=method, metric="kl", edge_nodes=0))
        assert ("its gradient vanishes where this method takes it" in caplog.text) == flat


def test_positions(tiny_model, tiny_saes, tiny_prompts):
    """Summing a circuit by position over positions gives the circuit of sums; ragged prompts are refused."""
    same_length = tiny_prompts[1::2]
    options = {"method": "attrib", "edge_nodes": 30}
    by_position = discover(
        tiny_model, tiny_saes, same_length, DiscoverOptions(aggregation="position", **options), progress=False
    )
    summed = discover(tiny_model, tiny_saes, same_length, DiscoverOptions(**options), progress=False)
    for site, nodes in by_position.nodes.items():
        total = torch.zeros(nodes.n_features + 1).index_add_(0, nodes.feature, nodes.effect)
        expected = torch.zeros_like(total)
        expected[summed.nodes[site].feature] = summed.nodes[site].effect
        assert_near(total, expected)
    assert len(by_position.metadata["tokens"]) == 7
    assert all("@" in name for site, nodes in by_position.edge_nodes.items() for name in nodes.ids(site))
    with pytest.raises(UserError, match=r"lengths \[5, 7\]"):
        discover(tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(aggregation="position"), progress=False)


def test_exact_method_and_no_edges(tiny_model, tiny_saes, tiny_prompts):
    found = discover(
        tiny_model,
        tiny_saes,
        tiny_prompts[:2],
        DiscoverOptions(method="exact", edge_nodes=0, sites="mlp"),
        progress=False,
    )
    assert found.metadata["sites"] == ["mlp_0", "mlp_1"] and not found.edges
    assert count(found.nodes) > 5
    assert found.graph(nodes=5).graph.number_of_edges() == 0


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("method", "igg", "'ig'"),
        ("rule", "mid", "midpoint"),
        ("aggregation", "none", "sum"),
        ("steps", 0, "steps is 0: it must be 1 to 1000"),
    ],
)
def test_options_are_checked(option, value, hint):
    with pytest.raises(UserError, match=hint):
        DiscoverOptions(**{option: value})
