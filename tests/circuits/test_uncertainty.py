"""Intervals against a bootstrap spelt out in loops and against known distributions; halves against known signals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from circuits.attribution.effects import SiteEffects
from circuits.circuit import Circuit
from circuits.discovery import DiscoverOptions, discover
from circuits.nodes import SiteNodes, aggregate_site, count, distinguishable
from circuits.uncertainty import (
    Bootstrap,
    edge_intervals,
    node_intervals,
    split_half,
    uncertainty_line,
    with_uncertainty,
)
from sae.errors import UserError
from sae.sites import Site

SITE = Site("resid", 0)


def effects_of(table: torch.Tensor, *, positions: torch.Tensor | None = None) -> SiteEffects:
    """Sparse effects of a dense table [B, F + 1], every example at its own position or all at 0."""
    example, feature = table.nonzero(as_tuple=True)
    position = torch.zeros_like(example) if positions is None else positions[example]
    return SiteEffects(
        table.shape[1] - 1, example.int(), position.int(), feature.int(), table[example, feature].float()
    )


def nodes_of(effects: SiteEffects, n_examples: int, aggregation: str = "sum", n_positions: int = 1) -> SiteNodes:
    return aggregate_site(effects, n_examples=n_examples, n_positions=n_positions, aggregation=aggregation)


@pytest.mark.parametrize("aggregation", ["sum", "position"])
def test_intervals_against_loops(monkeypatch, aggregation):
    """Every resample drawn, averaged and sorted by hand, with the same draws; chunks of a few nodes change nothing."""
    monkeypatch.setattr("circuits.uncertainty.CHUNK_BYTES", 4 * 40 * 3)
    table = torch.randn(12, 8) * (torch.rand(12, 8) < 0.4)
    positions = torch.randint(3, (12,))
    effects = effects_of(table, positions=positions)
    nodes = nodes_of(effects, 12, aggregation, 3)
    bootstrap = Bootstrap(resamples=40, level=0.8, seed=3)
    found = node_intervals({SITE: effects}, {SITE: nodes}, n_examples=12, bootstrap=bootstrap)[SITE]
    draws = torch.randint(12, (40, 12), generator=torch.Generator().manual_seed(3))
    for feature, position, (low, high) in zip(
        nodes.feature.tolist(), nodes.position.tolist(), found.tolist(), strict=True
    ):
        means = []
        for draw in draws.tolist():
            kept = [table[b, feature].item() if position in (-1, int(positions[b])) else 0.0 for b in draw]
            means.append(sum(kept) / len(kept))
        assert low == pytest.approx(np.quantile(means, 0.1), abs=1e-5)
        assert high == pytest.approx(np.quantile(means, 0.9), abs=1e-5)


def test_intervals_of_normal_effects_have_the_textbook_width():
    """200 examples of N(mu, 1): the interval is mean +- 1.96 / sqrt(200), within the noise of 2000 resamples."""
    values = torch.randn(200, 6) + torch.tensor([0.0, 1, 2, 3, 4, 5])
    effects = effects_of(values)
    nodes = nodes_of(effects, 200)
    intervals = node_intervals({SITE: effects}, {SITE: nodes}, n_examples=200, bootstrap=Bootstrap(resamples=2000))
    width = intervals[SITE][:, 1] - intervals[SITE][:, 0]
    expected = 2 * 1.96 * values.std(0)[nodes.feature] / math.sqrt(200)
    assert torch.allclose(width, expected, rtol=0.1)
    assert torch.allclose(intervals[SITE].mean(1), nodes.effect, atol=0.02)


def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 features without effect: about a twentieth of the 95 % intervals leave out zero."""
    effects = effects_of(torch.randn(80, 400))
    nodes = {SITE: nodes_of(effects, 80)}
    found = distinguishable(nodes, node_intervals({SITE: effects}, nodes, n_examples=80))
    assert 0.02 < count(found) / 400 < 0.1


def test_one_example_proves_nothing():
    """A feature that only ever mattered in one prompt of fifty is not distinguishable; one that always did is."""
    table = torch.zeros(50, 3)
    table[7, 0], table[:, 1] = 100.0, -0.1 - 0.01 * torch.rand(50)
    effects = effects_of(table)
    nodes = {SITE: nodes_of(effects, 50)}
    assert nodes[SITE].feature.tolist() == [0, 1]
    found = distinguishable(nodes, node_intervals({SITE: effects}, nodes, n_examples=50))
    assert found[SITE].feature.tolist() == [1]


def test_halves_agree_on_signal_and_by_chance_on_noise():
    signal = torch.linspace(1, 100, 100).expand(40, 100) + 0.01 * torch.randn(40, 100)
    noise = torch.randn(40, 100)
    results = []
    for table in (signal, noise):
        effects = effects_of(table)
        results.append(split_half({SITE: effects}, {SITE: nodes_of(effects, 40)}, n_examples=40, sizes=[10, 50, 500]))
    strong, weak = results
    assert strong.sizes == [10, 50] and strong.chance == [0.1, 0.5]
    assert strong.overlap == pytest.approx([1, 1]) and strong.correlation > 0.999
    assert weak.overlap == pytest.approx(weak.chance, abs=0.12) and abs(weak.correlation) < 0.2
    assert split_half({SITE: effects}, {SITE: nodes_of(effects, 40)}, n_examples=3) is None


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    return with_uncertainty(
        discover(tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method="attrib", edge_nodes=40), progress=False),
        Bootstrap(resamples=200),
    )


def test_a_circuit_keeps_its_intervals(circuit, tmp_path):
    circuit.save(tmp_path, graph=circuit.graph(nodes=30))
    again = Circuit.load(tmp_path)
    assert again.graph(nodes=30).to_json() == circuit.graph(nodes=30).to_json()
    for node in again.graph(nodes=30).nodes():
        if node.kind != "metric":
            low, high = node.attributes["interval"]
            assert low <= node.effect <= high or abs(node.effect) < 1e-4
    known = again.metadata["uncertainty"]
    assert known["resamples"] == 200 and len(known["split_half"]["overlap"]) == len(known["split_half"]["sizes"])
    assert f"{known['n_distinguishable']} of {count(again.nodes)} nodes" in uncertainty_line(again)


def test_only_what_is_distinguishable(circuit, tiny_model, tiny_saes, tiny_prompts):
    graph, certain = circuit.graph(nodes=40), circuit.graph(nodes=40, significant=True)
    expected = [
        node.id
        for node in graph.nodes()
        if node.kind == "metric" or node.attributes["interval"][0] * node.attributes["interval"][1] > 0
    ]
    assert [node.id for node in certain.nodes()] == expected
    assert 1 < len(certain) < len(graph)
    for node in certain.nodes():
        assert node == graph.node(node.id)
    plain = discover(
        tiny_model, tiny_saes, tiny_prompts, DiscoverOptions(method="attrib", edge_nodes=0), progress=False
    )
    with pytest.raises(UserError, match="no intervals"):
        plain.graph(significant=True)


@pytest.mark.parametrize("options", [{"resamples": 0}, {"level": 1.0}, {"level": 0.0}])
def test_options_are_checked(options):
    with pytest.raises(UserError):
        Bootstrap(**options)


def test_edge_intervals_against_loops(monkeypatch):
    """Every resample drawn, averaged and sorted by hand, with the same draws, chunk by chunk."""
    monkeypatch.setattr("circuits.uncertainty.CHUNK_BYTES", 4 * 40 * 3)
    samples = torch.randn(12, 2, 5) * (torch.rand(2, 5) < 0.6)
    pair, silent = (SITE, None), (SITE, Site("resid", 1))
    bootstrap = Bootstrap(resamples=40, level=0.8, seed=3)
    of_all = edge_intervals({pair: samples, silent: torch.zeros(12, 3, 2)}, bootstrap=bootstrap)
    assert torch.equal(of_all[silent], torch.zeros(3, 2, 2))
    found = of_all[pair]
    draws = torch.randint(12, (40, 12), generator=torch.Generator().manual_seed(3))
    means = samples[draws].mean(1)  # [R, 2, 5]
    expected = np.quantile(means.numpy(), [0.1, 0.9], axis=0)
    assert np.allclose(found.numpy(), np.moveaxis(expected, 0, -1), atol=1e-5)


def test_edges_of_a_circuit_have_intervals(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    """Weights of single prompts, in the prompts' order whatever the batches, average to the edges; significant graphs
    keep the edges whose interval leaves out zero.
    """
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    assert circuit.edge_samples.keys() == circuit.edges.keys()
    for pair, weights in circuit.edges.items():
        assert circuit.edge_samples[pair].shape == (8, *weights.shape)
        assert torch.allclose(circuit.edge_samples[pair].mean(0), weights, atol=1e-6)
    for number in (1, 4):
        alone = discover(tiny_model, tiny_saes, tiny_prompts[[number]], options, progress=False)
        by_name = {edge[:2]: edge.weight for edge in alone.graph(nodes=40).edges()}
        names = {site: nodes.ids(site) for site, nodes in circuit.edge_nodes.items()}
        compared = 0
        for (up, down), samples in circuit.edge_samples.items():
            for row, column in samples[number].nonzero().tolist():
                ends = names[up][column], "metric" if down is None else names[down][row]
                if ends in by_name:
                    assert samples[number, row, column].item() == pytest.approx(by_name[ends], abs=1e-5)
                    compared += 1
        assert compared > 10
    circuit = with_uncertainty(circuit)
    assert "edges are distinguishable" in uncertainty_line(circuit)
    graph = circuit.graph(nodes=40)
    circuit.save(tmp_path / "circuit", graph=graph)
    again = Circuit.load(tmp_path).graph(nodes=40)
    assert again.edges() == graph.edges()
    inside = [edge for edge in graph.edges() if edge.interval and edge.interval[0] <= edge.weight <= edge.interval[1]]
    assert len(inside) == graph.graph.number_of_edges()
    sure = Circuit.load(tmp_path).graph(nodes=40, significant=True).edges()
    assert 0 < len(sure) < len(inside)
    assert all(edge.interval and edge.interval[0] * edge.interval[1] > 0 for edge in sure)


def test_too_many_edges_are_summed(monkeypatch, tiny_model, tiny_saes, tiny_prompts):
    monkeypatch.setattr("circuits.passes.SAMPLE_BYTES", 1000)
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    assert circuit.edges and not circuit.edge_samples
    circuit = with_uncertainty(circuit)
    assert circuit.intervals and not circuit.edge_intervals
    assert "edges" not in uncertainty_line(circuit)
