"""Masks on edges: gates that act as they say, and a planted circuit whose edges are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import count
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues, NodeTable
from circuits.faithfulness.edge_mask import GatedEdges, edge_mask_circuit, learn_edge_mask
from circuits.faithfulness.edges import edge_faithfulness, edges_from
from circuits.faithfulness.mask_gates import budget_gates
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions, FaithfulnessOptions, MaskOptions
from sae.errors import UserError
from tests.circuits.faithfulness.test_edges import by_hand, circuit_of, every_feature
from tests.circuits.ground_truth import agreement, recovery


@pytest.fixture(scope="module")
def circuit(tiny_model, tiny_saes, tiny_prompts):
    return circuit_of(tiny_model, tiny_saes, tiny_prompts[1::2], edge_nodes=14)


@pytest.fixture(scope="module")
def gates(tiny_model, tiny_saes, circuit):
    nodes, edges = edges_from(circuit, None)
    return GatedEdges(Setting(tiny_model, tiny_saes, logit_difference), nodes, edges)


def clean_activations(gates, model, prompts):
    return model.run(prompts.clean, capture=gates.clean_sites(model)).activations


def test_half_open_gates_node_by_node(tiny_model, tiny_saes, circuit, gates):
    """Every edge with a gate of its own, against a run for every node; prompts by themselves as all together."""
    prompts = circuit.prompts
    whole = {site: every_feature(nodes.n_features) for site, nodes in circuit.nodes.items()}
    setting = gates.study.setting
    values = [
        AblationValues(setting, NodeTable(tiny_saes, [nodes], sites=list(tiny_saes)), "mean", reference=prompts)(
            prompts
        )
        for nodes in (whole, gates.nodes)
    ]
    openings = torch.rand(1, gates.n, generator=torch.Generator().manual_seed(0))
    of_pairs = {pair: gate[:, 0] for pair, gate in gates._gates(openings).items()}
    expected = by_hand(tiny_model, tiny_saes, circuit, prompts, of_pairs, values[0])
    clean = clean_activations(gates, tiny_model, prompts)
    for rows in (openings, openings.expand(len(prompts), -1)):
        logits = gates.logits(tiny_model, rows, prompts, values[1], clean, grad=False)
        assert logit_difference(logits, prompts).mean().item() == pytest.approx(expected, abs=1e-4)


def test_gradient_against_finite_differences(tiny_model, circuit, gates):
    """d m / d (scores of edges and nodes), along the gradient."""
    prompts = circuit.prompts
    values = AblationValues(gates.study.setting, gates.table, "mean", reference=prompts)(prompts)
    clean = clean_activations(gates, tiny_model, prompts)
    budgets = torch.tensor([gates.n // 2])

    def m(parameters, *, grad):
        openings = budget_gates(gates.scores(parameters), budgets, temperature=2.0)
        return logit_difference(gates.logits(tiny_model, openings, prompts, values, clean, grad=grad), prompts).mean()

    start = gates.start("effects")
    leaf = start.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(m(leaf, grad=True), leaf)
    assert gradient[: gates.n].any() and gradient[gates.n :].any()
    # the threshold carries no gradient: a step that leaves it where it is
    free = torch.zeros_like(start)
    order = gates.scores(start).argsort(descending=True)
    free[order[: gates.n // 4]] = gradient[order[: gates.n // 4]]
    direction, step = free / free.norm(), 0.05
    with torch.no_grad():
        slope = (m(start + step * direction, grad=False) - m(start - step * direction, grad=False)).item() / (2 * step)
    assert slope == pytest.approx((gradient @ direction).item(), rel=0.05)


@pytest.mark.slow
def test_cold_gates_are_the_edges_whose_faithfulness_is_measured(circuit):
    """A mask of one step: its ranking, and the circuit of its first edges, by `edge_faithfulness`."""
    options = MaskOptions(steps=1, smallest=3)
    mask = learn_edge_mask(circuit, options=options, progress=False)
    frame = mask.to_frame()
    n_edges = sum(int(weights.count_nonzero()) for weights in circuit.edges.values())
    assert len(frame) == n_edges and len(mask.losses) == 1 and "loss" in mask.text()
    scoring = FaithfulnessOptions(random=0, resamples=0)
    ranked = edge_faithfulness(replace(circuit, edges=mask.edges), options=scoring, sizes=[20], progress=False)
    written = edge_mask_circuit(circuit, mask, 20, progress=False)
    kept = sum(int(weights.count_nonzero()) for weights in written.edges.values())
    assert kept <= 20 and count(written.nodes) == count(written.edge_nodes) <= 14
    again = edge_faithfulness(written, circuit.prompts, scoring, sizes=[kept], progress=False)
    assert again.faithfulness[0] == pytest.approx(ranked.faithfulness[0], abs=1e-3)
    drawn = {f"{row.upstream} {row.downstream}" for row in frame.head(20).itertuples()}
    shown = written.edges_frame()
    assert len(shown) == kept
    assert {f"{row.source} {row.target}" for row in shown.itertuples()} <= drawn
    last = {pair: weights * (0.1 if pair[1] is None else 1) for pair, weights in mask.edges.items()}
    with pytest.raises(UserError, match="none of the 1 edges kept longest is on a path to the metric"):
        edge_mask_circuit(circuit, replace(mask, edges=last), 1, progress=False)


@pytest.mark.slow
def test_the_true_edges_are_found_without_attribution():
    """The number circuit set by hand, scores alike at the start: what is kept longest are its twelve edges."""
    truth = agreement()
    circuit = discover(
        truth.model, truth.saes, truth.prompts[::2], DiscoverOptions(
            method="attrib", aggregation="position", edge_nodes=30
        ),
        progress=False,
    )  # fmt: skip
    options = MaskOptions(start="equal", steps=12, ablation="counterfactual", smallest=6, largest=200)
    frame = learn_edge_mask(circuit, options=options, progress=False).to_frame()
    scores = {(row.upstream, row.downstream): float(len(frame) - row.rank) for row in frame.itertuples()}
    assert truth.edges <= set(scores)
    assert recovery(scores, truth.edges, list(scores)).auroc > 0.8


def test_what_cannot_be_learned(circuit):
    with pytest.raises(UserError, match="errors as nodes"):
        learn_edge_mask(circuit, options=MaskOptions(errors="keep"), progress=False)
    with pytest.raises(UserError, match="no edges"):
        learn_edge_mask(replace(circuit, edges={}, edge_nodes={}), progress=False)
