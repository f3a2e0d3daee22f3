"""Do the edges carry what they are drawn to carry? Faithfulness of a set of edges, by intervention.

A node's weight says that the node matters; which nodes it acts through is a second claim, and this refutes or backs it.
Every downstream node is recomputed from only those upstream nodes whose edge to it is kept; all its other inputs take
their ablation value (circuits.faithfulness.edge_run says how; the sites before `start_site` have their clean values).
So is the metric, m(E) for the kept edges E. Then

    faithfulness(E) = (m(E) - m(0)) / (m(M) - m(0)),

with m(0) no edge kept and M the whole model. With all nodes joined between which edges were computed, it equals the
faithfulness of these nodes. That is more than all edges with a weight: a feature that is silent on the clean prompts
has none, though it can be woken. Beside the strongest edges stand random ones, drawn among all edges with a weight.

Legend: B prompts, U upstream and D downstream nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.attribution.edges import Edges
from circuits.attribution.nodes import Nodes, count
from circuits.circuit import Circuit
from circuits.faithfulness.ablation import AblationValues
from circuits.faithfulness.edge_run import EdgeGates, EdgeRun, EdgeStudy
from circuits.faithfulness.nodes import (
    aligned,
    behaviour_of,
    from_start_site,
    share_intervals,
    shares,
    sizes_within,
)
from circuits.faithfulness.optimal_ablation import ablation_values
from circuits.faithfulness.results import EdgeFaithfulness
from circuits.metrics.metrics import Metric
from circuits.options import FaithfulnessOptions
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap, too_few
from sae._progress import ProgressBar
from sae.errors import UserError


def edge_faithfulness(
    circuit: Circuit,
    prompts: PromptSet | None = None,
    options: FaithfulnessOptions | None = None,
    *,
    sizes: Sequence[int] = (100, 200, 500, 1000, 2000, 5000),
    reference: PromptSet | None = None,
    metric: str | Metric | None = None,
    max_rows: int = 512,
    progress: bool = True,
) -> EdgeFaithfulness:
    """Measure how much of the behaviour the strongest edges of a circuit carry, every other input ablated.

    Args:
        circuit: A circuit with edges, whose model, SAEs and metric are used.
        prompts: What to measure on, best held out; the prompts the circuit was found on by default.
        options: As for `faithfulness`; errors are nodes, and those without an edge are ablated like any node.
        sizes: Numbers of edges.
        reference: Prompts whose means or values ablated inputs take; those the circuit was found on by default.
        metric: The circuit's own, given again where it is Python code and the circuit is from a file.
        max_rows: Prompts that go through the model at once.
        progress: Whether to show a progress bar.

    Returns:
        A curve over sizes, in shares of the behaviour.

    Raises:
        UserError: If the circuit has no edges from the start site on, or errors are no nodes.
    """
    options = options or FaithfulnessOptions()
    if options.errors != "nodes":
        raise UserError(f"errors is {options.errors!r}: edges are measured with errors as nodes")
    setting = circuit.setting(metric)
    reference = circuit.prompts if reference is None else reference
    prompts = setting.prepare(circuit.prompts if prompts is None else prompts)
    nodes, edges = edges_from(circuit, options.start_site)
    n_edges = sum(int(weights.count_nonzero()) for weights in edges.values())
    sizes = sizes_within(sizes, n_edges, of="edges")
    reference, prompts, n_uncovered = aligned(reference, prompts, options.ablation)
    values = ablation_values(
        setting, options.ablation, [({}, True), (nodes, True)], nodes=nodes, reference=reference,
        seed=options.seed, batch_size=options.batch_size, progress=progress,
    )  # fmt: skip
    sets = _edge_sets(edges, sizes, n_random=options.random, seed=options.seed)
    study = EdgeStudy(setting, values.table, nodes, max_rows)
    m_all = _metrics(study, values, sets, prompts, batch_size=options.batch_size, progress=progress)
    return _record(m_all, sizes, nodes, options, n_edges=n_edges, groups=prompts.groups, n_uncovered=n_uncovered)


def edges_from(circuit: Circuit, start_site: str | None) -> tuple[Nodes, Edges]:
    """The nodes between which edges were computed, and the edges, from the start site on."""
    nodes = {site: circuit.edge_nodes.get(site, of_site[:0]) for site, of_site in circuit.nodes.items()}
    nodes = from_start_site(nodes, start_site)
    edges = {pair: weights for pair, weights in circuit.edges.items() if pair[0] in nodes}
    if not any(weights.any() for weights in edges.values()):
        raise UserError("the circuit has no edges here: discover it with edge nodes, or start at an earlier site")
    return nodes, edges


def _record(
    m_all: Tensor, sizes: list[int], nodes: Nodes, options: FaithfulnessOptions, *, n_edges: int, groups: Tensor,
    n_uncovered: int,
) -> EdgeFaithfulness:  # fmt: skip
    """From m_all [3 + sets, B]: the whole model, no edge, all nodes joined, the strongest edges, the random draws."""
    m_model, m_empty = behaviour_of(m_all, "edge")
    f = shares(m_all.mean(1)).tolist()
    n = len(sizes)
    intervals = []
    if options.resamples and not too_few(groups):
        bootstrap = Bootstrap(resamples=options.resamples, seed=options.seed)
        intervals = share_intervals(m_all[: 3 + n], groups, bootstrap)[1:].tolist()
    return EdgeFaithfulness(
        sizes=sizes,
        faithfulness=f[1 : 1 + n],
        random=[f[start : start + n] for start in range(1 + n, len(f), n)],
        all_joined=f[0],
        n_edges=n_edges,
        n_nodes=count(nodes),
        m_model=m_model,
        m_empty=m_empty,
        ablation=options.ablation,
        start_site=next(iter(nodes)).name,
        n_prompts=m_all.shape[1],
        n_uncovered=n_uncovered,
        intervals=intervals,
    )


def _edge_sets(edges: Edges, sizes: Sequence[int], *, n_random: int, seed: int) -> list[EdgeGates]:
    """No edge, all nodes joined, the strongest edges of each size, and random draws of these sizes."""
    everything = {pair: torch.ones_like(weights) for pair, weights in edges.items()}
    sets = [strongest_edges(edges, 0), everything, *(strongest_edges(edges, size) for size in sizes)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_random):
        rank = {pair: torch.rand(w.shape, generator=generator) * (w != 0) for pair, w in edges.items()}
        sets += [strongest_edges(rank, size) for size in sizes]
    return sets


def strongest_edges(edges: Edges, n: int) -> EdgeGates:
    """1 for the n edges of largest |weight| (edges to the metric among them), 0 for all others."""
    magnitudes = torch.cat([weights.abs().flatten() for weights in edges.values()])
    keep = torch.zeros_like(magnitudes)
    keep[magnitudes.argsort(descending=True, stable=True)[:n]] = 1
    masks = keep.split([weights.numel() for weights in edges.values()])
    return {pair: mask.view_as(edges[pair]) for pair, mask in zip(edges, masks, strict=True)}


@torch.no_grad()
def _metrics(
    study: EdgeStudy,
    values: AblationValues,
    sets: Sequence[EdgeGates],
    prompts: PromptSet,
    *,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Metric of the plain model and of every set of edges on every prompt, [1 + sets, B] float64."""
    columns, setting = [], study.setting
    n_batches = -(-len(prompts) // batch_size)
    with ProgressBar(total=n_batches * len(sets), desc="edge faithfulness", unit="set", disable=not progress) as bar:
        for batch in prompts.batches(batch_size):
            reads = setting.saes.read_sites(setting.saes)
            plain = setting.model.run(batch.clean, capture={*reads, *reads.values()}, last_only=True)
            column = [setting.metric(plain.logits[:, -1], batch)]
            ablated = values(batch)
            for edges in sets:
                column.append(EdgeRun(study, edges, batch, plain.activations, ablated).metric())
                bar.update()
            columns.append(torch.stack(column).cpu().double())  # MPS has no float64
    return torch.cat(columns, dim=1)
