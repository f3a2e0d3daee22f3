"""Edges kept by intervention: against node by node recomputation, and where it must equal keeping nodes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import SiteNodes
from circuits.discovery.discover import discover
from circuits.faithfulness.ablation import AblationValues, NodeTable
from circuits.faithfulness.edges import edge_faithfulness, strongest_edges
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.metrics.metrics import logit_difference
from circuits.options import DiscoverOptions
from sae.errors import UserError
from sae.model.sites import Site
from tests.circuits.ground_truth import agreement


def circuit_of(model, saes, prompts, **options):
    return discover(model, saes, prompts, DiscoverOptions(method="attrib", **options), progress=False)


def by_hand(model, saes, circuit, prompts, kept, values) -> float:
    """m with gates on edges, 1 where they are kept: every node by a run of its own in which all earlier sites are
    overwritten.
    """
    clean = model.run(prompts.clean, capture=list(saes)).activations
    direct = {(up, down) for up, down in circuit.edges}
    states: dict[tuple[Site, int], torch.Tensor] = {}  # what a node adds to its site, [B, S, d]
    sites = list(saes)

    def inputs(down: Site | None, row: int):
        edits = {}
        for up in sites if down is None else sites[: sites.index(down)]:
            x = values[up].x
            if (up, down) in direct:
                gate = kept[up, down][row]
                for column in gate.nonzero()[:, 0].tolist():
                    x = x + gate[column] * states[up, column]
            edits[up] = lambda _, x=x: x.expand(*prompts.clean.input_ids.shape, -1)
        return edits

    for site in sites:
        nodes, sae = circuit.edge_nodes[site], saes[site]
        for number, (feature, position) in enumerate(zip(nodes.feature.tolist(), nodes.position.tolist(), strict=True)):
            if site == sites[0]:
                y = clean[site]
            else:
                y = model.run(prompts.clean, edits=inputs(site, number), capture=[site]).activations[site]
            f = sae.encode(y)
            if feature == nodes.n_features:
                moved = y - sae.decode(f) - values[site].error
            else:
                mean_f = sae_values(values, site, feature)
                moved = (f[..., feature] - mean_f)[..., None] * sae.W_dec[feature]
            if position >= 0:
                moved = moved * (torch.arange(y.shape[1]) == position)[:, None]
            states[site, number] = moved
    logits = model.run(prompts.clean, edits=inputs(None, 0), last_only=True).logits[:, -1]
    return logit_difference(logits, prompts).mean().item()


def every_feature(n: int) -> SiteNodes:
    return SiteNodes(n, torch.arange(n), torch.full((n,), -1), torch.zeros(n))


def sae_values(values, site, feature):
    """The ablation value of one feature; the table of the test holds every feature in order."""
    return values[site].features[..., feature]


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "aggregation"), [("gpt_neox", "position"), ("llama", "sum")])
def test_node_by_node(make_tiny_model, make_saes, tiny_prompts, architecture, aggregation):
    model = make_tiny_model(architecture)
    saes = make_saes(model)
    prompts = tiny_prompts[1::2]
    circuit = circuit_of(model, saes, prompts, edge_nodes=14, aggregation=aggregation)
    assert any(nodes.is_error.any() for nodes in circuit.edge_nodes.values())
    whole = {site: every_feature(nodes.n_features) for site, nodes in circuit.nodes.items()}
    table = NodeTable(saes, [whole], sites=list(saes))
    values = AblationValues(Setting(model, saes, logit_difference), table, "mean", reference=prompts)(prompts)
    n_edges = sum(int(w.count_nonzero()) for w in circuit.edges.values())
    sizes = [n_edges // 10, n_edges // 3]
    options = FaithfulnessOptions(random=1, batch_size=3, seed=2)
    result = edge_faithfulness(circuit, prompts, options, sizes=sizes, max_rows=7, progress=False)
    assert result.n_edges == n_edges and result.sizes == sizes and result.n_nodes == 14
    generator = torch.Generator().manual_seed(2)
    drawn = {pair: torch.rand(w.shape, generator=generator) * (w != 0) for pair, w in circuit.edges.items()}
    for row, size in enumerate(sizes):
        for found, edges in ((result.faithfulness, circuit.edges), (result.random[0], drawn)):
            m = by_hand(model, saes, circuit, prompts, strongest_edges(edges, size), values)
            expected = (m - result.m_empty) / (result.m_model - result.m_empty)
            assert found[row] == pytest.approx(expected, abs=2e-3)
    assert result.intervals == []  # four prompts are too few


@pytest.mark.parametrize(
    ("ablation", "start_site"), [("mean", None), ("counterfactual", "mlp_0"), ("zero", None), ("mean", "mlp_0")]
)
def test_all_nodes_joined_are_the_nodes_kept(tiny_model, tiny_saes, tiny_prompts, ablation, start_site):
    circuit = circuit_of(tiny_model, tiny_saes, tiny_prompts, edge_nodes=60)
    options = FaithfulnessOptions(ablation, start_site=start_site, random=0)
    edges = edge_faithfulness(circuit, tiny_prompts, options, sizes=[1, 10**6], progress=False)
    nodes = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes), circuit.edge_nodes, tiny_prompts, options, sizes=[10**6], progress=False
    )
    assert edges.n_nodes == nodes.sizes[0]
    assert edges.m_model == pytest.approx(nodes.m_model, abs=1e-5)
    assert edges.m_empty == pytest.approx(nodes.m_empty, abs=1e-4)
    assert edges.all_joined == pytest.approx(nodes.faithfulness[0], abs=2e-3)


def test_missing_sites_are_computed_through(tiny_model, tiny_saes, tiny_prompts):
    saes = {site: sae for site, sae in tiny_saes.items() if site.kind == "mlp"}
    circuit = circuit_of(tiny_model, saes, tiny_prompts, edge_nodes=200)
    options = FaithfulnessOptions("zero", random=0)
    edges = edge_faithfulness(circuit, tiny_prompts, options, sizes=[5], progress=False)
    nodes = measure_faithfulness(
        Setting.of(tiny_model, saes), circuit.edge_nodes, tiny_prompts, options, sizes=[10**6], progress=False
    )
    assert edges.all_joined == pytest.approx(nodes.faithfulness[0], abs=2e-3)


@pytest.mark.slow
def test_true_edges_of_a_known_circuit_suffice_and_each_is_needed():
    """In the hand-made number circuit the twelve true edges carry all; without one of them a number is lost."""
    truth = agreement()
    prompts = truth.prompts[:8]  # of either number
    circuit = circuit_of(truth.model, truth.saes, prompts, aggregation="position", edge_nodes=100)
    names = {site: nodes.ids(site) for site, nodes in circuit.edge_nodes.items()}

    def faithfulness(true) -> float:
        edges = {}
        for (up, down), weights in circuit.edges.items():
            targets = ["metric"] if down is None else names[down]
            edges[up, down] = torch.tensor([[float((u, d) in true) for u in names[up]] for d in targets]).view_as(
                weights
            )
        only = replace(circuit, edges=edges)
        options = FaithfulnessOptions("counterfactual", random=0, resamples=0)
        result = edge_faithfulness(only, prompts, options, sizes=[len(true)], progress=False)
        assert result.n_edges == len(true)
        return result.faithfulness[0]

    assert faithfulness(truth.edges) == pytest.approx(1, abs=0.1)
    for edge in sorted(truth.edges):
        assert faithfulness(truth.edges - {edge}) < 0.9, edge


@pytest.mark.slow
def test_table_and_plot(tiny_model, tiny_saes, tiny_prompts, tmp_path):
    circuit = circuit_of(tiny_model, tiny_saes, tiny_prompts, edge_nodes=20)
    result = edge_faithfulness(circuit, tiny_prompts, FaithfulnessOptions(random=2), sizes=[5, 10], progress=False)
    assert len(result.table().splitlines()) == 4 and len(result.random) == 2
    assert result.plot(tmp_path / "edges.svg").read_text().lstrip().startswith("<?xml")
    assert result.to_dict()["sizes"] == [5, 10]


def test_what_cannot_be_measured(tiny_model, tiny_saes, tiny_prompts):
    circuit = circuit_of(tiny_model, tiny_saes, tiny_prompts, edge_nodes=10)
    with pytest.raises(UserError, match="errors as nodes"):
        edge_faithfulness(circuit, tiny_prompts, FaithfulnessOptions(errors="keep"), progress=False)
    with pytest.raises(UserError, match="no edges"):
        edge_faithfulness(replace(circuit, edges={}, edge_nodes={}), tiny_prompts, progress=False)
    same = replace(tiny_prompts, patch=tiny_prompts.clean)
    with pytest.raises(UserError, match=r"ablating every edge leaves the metric at .*: there is nothing to explain"):
        edge_faithfulness(circuit, same, FaithfulnessOptions("counterfactual", random=0), progress=False)


def test_prompts_without_a_reference_are_told(tiny_model, tiny_saes, tiny_prompts):
    circuit = circuit_of(tiny_model, tiny_saes, tiny_prompts, edge_nodes=10)
    result = edge_faithfulness(
        circuit, tiny_prompts, FaithfulnessOptions(random=0), sizes=[5], reference=tiny_prompts[1::2], progress=False
    )
    assert result.to_dict()["n_uncovered"] == result.n_prompts == 4
    assert result.text().startswith("4 prompts (4 without a reference prompt of their template left out); edges among")


def test_strongest_edges_by_hand():
    edges = {
        (Site("embed"), Site("mlp", 0)): torch.tensor([[1.0, -4.0], [0.0, 2.0]]),
        (Site("mlp", 0), None): torch.tensor([[3.0, 0.5]]),
    }
    kept = strongest_edges(edges, 3)
    assert [mask.tolist() for mask in kept.values()] == [[[0, 1], [0, 1]], [[1, 0]]]
    assert sum(count.sum() for count in strongest_edges(edges, 0).values()) == 0


def test_nodes_whose_parents_have_none(tiny_model, tiny_saes, tiny_prompts):
    """A late node without any incoming edge sees only ablated parents: all joined still equals keeping it."""
    circuit = circuit_of(tiny_model, tiny_saes, tiny_prompts, edge_nodes=60)
    late = {Site.parse("mlp_1"), Site.parse("resid_1")}
    nodes = {site: here if site in late else here[:0] for site, here in circuit.edge_nodes.items()}
    edges = {(up, down): weights for (up, down), weights in circuit.edges.items() if up in late}
    options = FaithfulnessOptions(random=0)
    few = replace(circuit, edge_nodes=nodes, edges=edges)
    found = edge_faithfulness(few, tiny_prompts, options, sizes=[10**6], progress=False
    )  # fmt: skip
    kept = measure_faithfulness(
        Setting.of(tiny_model, tiny_saes), nodes, tiny_prompts, options, sizes=[10**6], progress=False
    )
    assert found.n_nodes > 2
    assert found.all_joined == pytest.approx(kept.faithfulness[0], abs=1e-4)
