"""Intervals against a bootstrap spelt out in loops and against known distributions; halves against known signals."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch

from circuits.attribution.activations import Setting
from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import SiteNodes, aggregate_site, count, distinguishable
from circuits.circuit import Circuit
from circuits.discovery.discover import discover
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.options import DiscoverOptions
from circuits.uncertainty.bootstrap import MIN_ACTIVE, Bootstrap, group_sums
from circuits.uncertainty.intervals import (
    edge_intervals,
    node_intervals,
    split_half,
    uncertainty_line,
    with_uncertainty,
)
from sae.errors import UserError
from sae.model.sites import Site
from tests.near import assert_near

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


def interval_by_hand(x: list[float], y: list[float], draws: list[list[int]], level: float) -> tuple[float, float]:
    """The wider, end by end, of the studentised and of Student's interval of sum x / sum y over groups."""
    n, tail = len(x), (1 - level) / 2

    def ratio_and_error(groups: list[int]) -> tuple[float, float]:
        total = sum(y[g] for g in groups)
        ratio = sum(x[g] for g in groups) / total
        square = sum((x[g] - ratio * y[g]) ** 2 for g in groups)
        return ratio, math.sqrt(n / (n - 1) * square) / abs(total)

    ratio, error = ratio_and_error(list(range(n)))
    t = []
    for draw in draws:
        shifted, spread = ratio_and_error(draw)
        t.append(math.copysign(1e6, shifted - ratio) if spread <= 1e-6 * error else (shifted - ratio) / spread)
    student = scipy.stats.t.ppf(1 - tail, n - 1)
    high, low = max(np.quantile(t, 1 - tail), student), min(np.quantile(t, tail), -student)
    return ratio - high * error, ratio - low * error


@pytest.mark.parametrize("aggregation", ["sum", "position"])
def test_intervals_against_loops(monkeypatch, aggregation):
    """Every resample of the groups drawn and studentised by hand, with the same draws, chunk of nodes by chunk."""
    monkeypatch.setattr("circuits.uncertainty.intervals.CHUNK_BYTES", 4 * 40 * 3)
    monkeypatch.setattr("circuits.uncertainty.intervals.MIN_ACTIVE", 0)
    table = torch.randn(12, 8) * (torch.rand(12, 8) < 0.8)
    positions = torch.randint(2, (12,))
    groups = torch.tensor([0, 0, 1, 2, 2, 2, 3, 4, 4, 5, 6, 6])
    effects = effects_of(table, positions=positions)
    nodes = nodes_of(effects, 12, aggregation, 3)
    bootstrap = Bootstrap(resamples=40, level=0.8, seed=3)
    found = node_intervals({SITE: effects}, {SITE: nodes}, n_examples=12, groups=groups, bootstrap=bootstrap)[SITE]
    draws = torch.randint(7, (40, 7), generator=torch.Generator().manual_seed(3))
    members = [(groups == group).nonzero()[:, 0].tolist() for group in range(7)]
    for feature, position, (low, high) in zip(
        nodes.feature.tolist(), nodes.position.tolist(), found.tolist(), strict=True
    ):
        one = [table[b, feature].item() if position in (-1, int(positions[b])) else 0.0 for b in range(12)]
        sums, sizes = [sum(one[b] for b in rows) for rows in members], list(map(len, members))
        assert (low, high) == pytest.approx(interval_by_hand(sums, sizes, draws.tolist(), 0.8), rel=1e-3, abs=1e-4)


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


def test_a_metric_that_is_negative_turns_no_interval_around():
    """Faithfulness is a ratio of two negative sums wherever the behaviour is there."""
    generator = torch.Generator().manual_seed(0)
    y = 5 + torch.randn(40, generator=generator)
    x = 0.5 * y[:, None] + torch.randn(40, 3, generator=generator)
    bounds = Bootstrap().intervals(-x, -y)
    assert (bounds[:, 0] < bounds[:, 1]).all()
    torch.testing.assert_close(bounds, Bootstrap().intervals(x, y))


def test_intervals_cover_the_truth_as_often_as_they_say():
    """400 features without effect: at most about a twentieth of the 95 % intervals leave out zero."""
    effects = effects_of(torch.randn(80, 400))
    nodes = {SITE: nodes_of(effects, 80)}
    found = distinguishable(nodes, node_intervals({SITE: effects}, nodes, n_examples=80))
    assert 0.01 < count(found) / 400 < 0.08


COVERED = {
    "normal": (lambda shape: 1 + torch.randn(shape), 1.0),
    "lognormal": (lambda shape: torch.randn(shape).exp(), math.exp(0.5)),
    "active on 6 %": (lambda shape: (torch.rand(shape) < 0.06) * (1 + 0.5 * torch.randn(shape)), 0.06),
    "no effect, active on 20 %": (lambda shape: (torch.rand(shape) < 0.2) * torch.randn(shape), 0.0),
}


@pytest.mark.parametrize("n", [8, 30, 100])
@pytest.mark.parametrize(("kind", "least"), [("normal", 0.92), ("lognormal", 0.86), ("active on 6 %", 0.92),
                                             ("no effect, active on 20 %", 0.92)])  # fmt: skip
def test_coverage_by_simulation(kind, least, n):
    """Of means over n prompts whose truth is known; where an interval says too few to tell, it does not miss."""
    draw, truth = COVERED[kind]
    low, high = Bootstrap(resamples=300).intervals(draw((n, 1500)), torch.ones(n), min_active=MIN_ACTIVE).T
    held = ((low <= truth) & (truth <= high))[~low.isnan()].float()
    assert len(held) < 150 or held.mean() > least
    if kind == "active on 6 %" and n == 8:
        assert len(held) == 0


def test_prompts_that_share_a_template_are_no_new_evidence():
    """16 templates of 20 prompts, most of the spread between templates: drawn by prompt, intervals often miss."""
    groups = torch.arange(16).repeat_interleave(20)
    values = torch.randn(16, 300).repeat_interleave(20, 0) + torch.randn(320, 300)

    def missed(drawn) -> float:
        sizes = group_sums(torch.ones(320), drawn)
        bounds = Bootstrap(resamples=200).intervals(group_sums(values, drawn), sizes)
        return (bounds.prod(-1) > 0).float().mean().item()

    assert missed(groups) < 0.1 and missed(torch.arange(320)) > 0.3


def test_groups_are_the_templates_of_the_prompts(tiny_prompts):
    def numbers(rule: str, keys: list[str]) -> list[int]:
        return replace(tiny_prompts, template_rule=rule, templates=keys).groups.tolist()

    each = list(range(8))
    assert numbers("length", ["5", "7"] * 4) == each
    assert numbers("mask", ["1 * 3", "1 * 4"] * 4) == [0, 1] * 4
    assert numbers("field", ["a/5", "a/7", "b/5", "b/7"] * 2) == [0, 0, 1, 1] * 2
    assert numbers("field", ["a/5", "a/7"] * 4) == each
    assert numbers("spans", ["x|a*1", "y|a*1", "x|a*2", "y|a*2"] * 2) == [0, 1] * 4
    assert numbers("spans", ["|a*1", "|a*2"] * 4) == each


def test_prompts_keep_their_templates_as_groups_under_another_rule(tiny_model, tiny_saes, tiny_prompts):
    """Held-out templates that no reference prompt has are keyed by length, and are still no eight prompts."""
    unlike = replace(tiny_prompts, template_rule="mask", templates=["1 * 3", "1 * 4"] * 4)
    named = replace(tiny_prompts, template_rule="field", templates=["a/5", "a/7", "b/5", "b/7"] * 2)
    assert unlike.with_templates("length").groups.tolist() == [0, 1] * 4
    assert unlike.with_templates("length")[[1, 2, 3]].groups.tolist() == [0, 1, 0]
    assert named.aligned_to(unlike).groups.tolist() == [0, 0, 1, 1] * 2
    assert named.aligned_to(unlike).with_templates("length").groups.tolist() == [0, 0, 1, 1] * 2
    nodes = discover(tiny_model, tiny_saes, named, DiscoverOptions(method="attrib", edge_nodes=0), progress=False).nodes
    reference = replace(tiny_prompts, template_rule="field", templates=["c/5", "c/7"] * 4)
    curve = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes), nodes, named, FaithfulnessOptions(random=0), sizes=[5], reference=reference,
        progress=False,
    )  # fmt: skip
    assert curve.drawn == "8 prompts drawn by their 2 templates" and curve.intervals is None


def test_a_prompt_that_is_repeated_is_no_new_evidence(tiny_prompts):
    twice = tiny_prompts[[0, 1, 2, 3, 0, 1, 2, 3]]
    assert twice.groups.tolist() == [0, 1, 2, 3] * 2
    others = twice.patch_answers.clone()
    others[4:] = twice.clean_answers[:4]
    assert replace(twice, patch_answers=others).groups.tolist() == list(range(8))


@pytest.mark.parametrize("rows", [[0], [0, 1, 2, 3]])
def test_few_prompts_have_no_intervals(tiny_model, tiny_saes, tiny_prompts, rows, tmp_path):
    prompts = tiny_prompts[rows]
    options = DiscoverOptions(method="attrib", edge_nodes=20, sites="resid")
    circuit = with_uncertainty(discover(tiny_model, tiny_saes, prompts, options, progress=False))
    assert not circuit.intervals and not circuit.edge_intervals
    assert "too few to tell: intervals need 5" in uncertainty_line(circuit)
    with pytest.raises(UserError, match="too few to tell"):
        circuit.graph(nodes=5, significant=True)
    curve = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes),
        circuit.nodes,
        prompts,
        FaithfulnessOptions(random=0, ablation="zero"),
        sizes=[5],
        progress=False,
    )
    assert curve.intervals is None and "[" not in curve.table()


@pytest.mark.parametrize("by", [0.5, -0.5])
@pytest.mark.parametrize(("different", "told"), [(0, True), (1, False), (3, False), (40, True)])
def test_a_few_prompts_that_differ_have_no_interval(different, told, by):
    """Of 200 alike; with three that are not, a resample in twenty has none of them, and so no spread to measure by."""
    x = torch.full((200, 1), 0.5).double()
    x[:different] += by
    low, high = Bootstrap().intervals(x, torch.ones(200).double())[0].tolist()
    assert (low == low and high == high) == told
    if told:
        assert 0.2 < low <= x.mean() <= high < 0.8


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


def test_no_template_is_in_both_halves():
    """Of noise that prompts of a template share, halves by prompt have the same in both."""
    groups = torch.arange(8).repeat_interleave(10)
    effects = effects_of(torch.randn(8, 100).repeat_interleave(10, 0))
    nodes = {SITE: nodes_of(effects, 80)}
    by_prompt, by_template = (
        split_half({SITE: effects}, nodes, n_examples=80, groups=drawn, sizes=[10]) for drawn in (None, groups)
    )
    assert by_prompt.correlation > 0.7 and abs(by_template.correlation) < 0.2
    assert by_template.overlap[0] == pytest.approx(0.1, abs=0.1) and by_prompt.overlap[0] > 0.4
    assert split_half({SITE: effects}, nodes, n_examples=80, groups=groups // 3) is None


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
        if "interval" in node.attributes:
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
        if node.kind == "metric" or math.prod(node.attributes.get("interval", (0, 0))) > 0
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
    """Every resample drawn and studentised by hand, with the same draws, chunk by chunk."""
    monkeypatch.setattr("circuits.uncertainty.intervals.CHUNK_BYTES", 4 * 40 * 3)
    monkeypatch.setattr("circuits.uncertainty.intervals.MIN_ACTIVE", 0)
    samples = torch.randn(12, 2, 5) * (torch.rand(2, 5) < 0.6)
    pair, silent = (SITE, None), (SITE, Site("resid", 1))
    bootstrap = Bootstrap(resamples=40, level=0.8, seed=3)
    of_all = edge_intervals({pair: samples, silent: torch.zeros(12, 3, 2)}, bootstrap=bootstrap)
    assert torch.equal(of_all[silent], torch.zeros(3, 2, 2))
    found = of_all[pair]
    draws = torch.randint(12, (40, 12), generator=torch.Generator().manual_seed(3))
    for row, column in samples[0].nonzero().tolist():
        by_hand = interval_by_hand(samples[:, row, column].tolist(), [1.0] * 12, draws.tolist(), 0.8)
        assert found[row, column].tolist() == pytest.approx(by_hand, rel=1e-3, abs=1e-4)


@pytest.mark.slow
def test_edges_of_a_circuit_have_intervals(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    """Weights of single prompts, in the prompts' order whatever the batches, average to the edges; significant graphs
    keep the edges whose interval leaves out zero.
    """
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    assert circuit.edge_samples.keys() == circuit.edges.keys()
    for pair, weights in circuit.edges.items():
        assert circuit.edge_samples[pair].shape == (8, *weights.shape)
        assert_near(circuit.edge_samples[pair].mean(0), weights)
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
    known = [edge for edge in graph.edges() if edge.interval]
    inside = [edge for edge in known if edge.interval[0] <= edge.weight <= edge.interval[1]]
    assert len(inside) == len(known) < graph.graph.number_of_edges()
    sure = Circuit.load(tmp_path).graph(nodes=40, significant=True).edges()
    assert len(sure) < len(inside)
    assert all(edge.interval and edge.interval[0] * edge.interval[1] > 0 for edge in sure)


@pytest.mark.slow
def test_edges_by_case_are_those_of_the_prompts_of_the_case(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    circuit.save(tmp_path / "circuit")
    frame = Circuit.load(tmp_path).edges_frame()
    rows_of = frame.set_index(["source", "target"])
    for edge in Circuit.load(tmp_path).graph(nodes=40).edges():
        assert edge.by_case == {case: rows_of.loc[edge[:2], f"weight ({case})"] for case in circuit.metadata["cases"]}
    shares = circuit.metadata["cases"]
    assert_near(
        sum(torch.tensor(frame[f"weight ({case})"]) * n / 8 for case, n in shares.items()),
        torch.tensor(frame["weight"]),
    )
    rows = [row for row, case in enumerate(tiny_prompts.cases) if case == "b_a"]
    alone = discover(tiny_model, tiny_saes, tiny_prompts[rows], options, progress=False).edges_frame()
    both = frame.merge(alone, on=["source", "target"])
    assert len(both) > 10
    assert_near(torch.tensor(both["weight (b_a)"]), torch.tensor(both["weight_y"]))
    assert not discover(tiny_model, tiny_saes, tiny_prompts[rows], options, progress=False).edge_cases  # one case


def test_too_many_edges_are_summed(monkeypatch, tiny_model, tiny_saes, tiny_prompts):
    monkeypatch.setattr("circuits.discovery.edge_pass.SAMPLE_BYTES", 1000)
    options = DiscoverOptions(method="attrib", edge_nodes=40)
    circuit = discover(tiny_model, tiny_saes, tiny_prompts, options, progress=False)
    assert circuit.edges and not circuit.edge_samples and not circuit.edge_cases
    circuit = with_uncertainty(circuit)
    assert circuit.intervals and not circuit.edge_intervals
    assert "edges" not in uncertainty_line(circuit)
