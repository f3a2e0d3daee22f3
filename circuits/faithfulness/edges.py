"""Do the edges carry what they are drawn to carry? Faithfulness of a set of edges, by intervention.

A node's weight says that the node matters; which nodes it acts through is a second claim, and this refutes or backs it.
Every downstream node is recomputed from only those upstream nodes whose edge to it is kept; all its other inputs take
their ablation value. With C the nodes between which edges were computed, E the kept edges, and for every site

    x_p(d) = x0_p + sum_{u in C at p, (u -> d) in E} (a_u - a0_u) W_dec[u]   (+ e_u - e0_u for an error node u)

what node d sees of its direct parent p:

1. In forward order, a_d is read off the site's output computed from x_p(d) at all direct parents p. Nodes that see the
   same inputs are computed together; nodes without a path of kept edges to the metric are not computed.
2. A site without parents in the circuit (the first one) has its clean values; so have the sites before `start_site`.
3. The metric is computed like any other node: m(E). Then

    faithfulness(E) = (m(E) - m(0)) / (m(M) - m(0)),

with m(0) no edge kept and M the whole model. With all nodes of C joined it equals the faithfulness of C. That is
more than all edges with a weight: a feature that is silent on the clean prompts has none, though it can be woken.
Beside the strongest edges stand random ones, drawn among all edges with a weight.

Legend: B prompts, S positions, d model width, G groups of nodes with equal inputs, U upstream and D downstream nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuits.attribution.edges import Edges
from circuits.attribution.nodes import Nodes, count
from circuits.circuit import Circuit
from circuits.faithfulness.ablation import AblationValues, Values
from circuits.faithfulness.nodes import aligned, from_start_site, share_intervals, shares, sizes_within
from circuits.faithfulness.optimal_ablation import ablation_values
from circuits.faithfulness.results import EdgeFaithfulness
from circuits.metrics.metrics import Metric
from circuits.options import FaithfulnessOptions
from circuits.prompts.dataset import PromptSet
from circuits.uncertainty.bootstrap import Bootstrap, too_few
from sae._progress import ProgressBar
from sae.errors import UserError
from sae.model.sites import Site

CircuitEdges = dict[tuple[Site, Site | None], Tensor]
"""(upstream, downstream or None for the metric) -> [D, U] float, 1 where the edge is kept."""


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
    nodes, edges = _from_start(circuit, options.start_site)
    n_edges = sum(int(weights.count_nonzero()) for weights in edges.values())
    sizes = sizes_within(sizes, n_edges, of="edges")
    reference, prompts, _ = aligned(reference, prompts, options.ablation)
    values = ablation_values(
        setting, options.ablation, [({}, True), (nodes, True)], nodes=nodes, reference=reference,
        seed=options.seed, batch_size=options.batch_size, progress=progress,
    )  # fmt: skip
    sets = _edge_sets(edges, sizes, n_random=options.random, seed=options.seed)
    study = _Study(values, nodes, max_rows)
    m_all = _metrics(study, sets, prompts, batch_size=options.batch_size, progress=progress)
    return _record(m_all, sizes, nodes, options, n_edges=n_edges, groups=prompts.groups)


def _from_start(circuit: Circuit, start_site: str | None) -> tuple[Nodes, Edges]:
    """The nodes between which edges were computed, and the edges, from the start site on."""
    nodes = {site: circuit.edge_nodes.get(site, of_site[:0]) for site, of_site in circuit.nodes.items()}
    nodes = from_start_site(nodes, start_site)
    edges = {pair: weights for pair, weights in circuit.edges.items() if pair[0] in nodes}
    if not any(weights.any() for weights in edges.values()):
        raise UserError("the circuit has no edges here: discover it with edge nodes, or start at an earlier site")
    return nodes, edges


def _record(
    m_all: Tensor, sizes: list[int], nodes: Nodes, options: FaithfulnessOptions, *, n_edges: int, groups: Tensor
) -> EdgeFaithfulness:
    """From m_all [3 + sets, B]: the whole model, no edge, all nodes joined, the strongest edges, the random draws."""
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
        m_model=m_all[0].mean().item(),
        m_empty=m_all[1].mean().item(),
        ablation=options.ablation,
        start_site=next(iter(nodes)).name,
        n_prompts=m_all.shape[1],
        intervals=intervals,
    )


def _edge_sets(edges: Edges, sizes: Sequence[int], *, n_random: int, seed: int) -> list[CircuitEdges]:
    """No edge, all nodes joined, the strongest edges of each size, and random draws of these sizes."""
    everything = {pair: torch.ones_like(weights) for pair, weights in edges.items()}
    sets = [strongest_edges(edges, 0), everything, *(strongest_edges(edges, size) for size in sizes)]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_random):
        rank = {pair: torch.rand(w.shape, generator=generator) * (w != 0) for pair, w in edges.items()}
        sets += [strongest_edges(rank, size) for size in sizes]
    return sets


def strongest_edges(edges: Edges, n: int) -> CircuitEdges:
    """1 for the n edges of largest |weight| (edges to the metric among them), 0 for all others."""
    magnitudes = torch.cat([weights.abs().flatten() for weights in edges.values()])
    keep = torch.zeros_like(magnitudes)
    keep[magnitudes.argsort(descending=True, stable=True)[:n]] = 1
    masks = keep.split([weights.numel() for weights in edges.values()])
    return {pair: mask.view_as(edges[pair]) for pair, mask in zip(edges, masks, strict=True)}


@dataclass(frozen=True)
class _Study:
    """What is the same for every set of edges and every batch."""

    values: AblationValues
    nodes: Nodes
    max_rows: int
    """Prompts that go through the model at once."""


@torch.no_grad()
def _metrics(
    study: _Study, sets: Sequence[CircuitEdges], prompts: PromptSet, *, batch_size: int, progress: bool
) -> Tensor:
    """Metric of the plain model and of every set of edges on every prompt, [1 + sets, B] float64."""
    columns, setting = [], study.values.setting
    n_batches = -(-len(prompts) // batch_size)
    with ProgressBar(total=n_batches * len(sets), desc="edge faithfulness", unit="set", disable=not progress) as bar:
        for batch in prompts.batches(batch_size):
            reads = setting.saes.read_sites(setting.saes)
            plain = setting.model.run(batch.clean, capture={*reads, *reads.values()}, last_only=True)
            column = [setting.metric(plain.logits[:, -1], batch)]
            ablated = study.values(batch)
            for edges in sets:
                column.append(_EdgeRun(study, edges, batch, plain.activations, ablated).metric())
                bar.update()
            columns.append(torch.stack(column).cpu().double())  # MPS has no float64
    return torch.cat(columns, dim=1)


@dataclass(frozen=True)
class _Moved:
    """How far a site's nodes are from their ablation values, and where that leaves the site."""

    rest: Tensor
    """x0, [B, S, d]."""
    delta: Tensor
    """a - a0 of every node where it is, [B, S, U]; 0 for nodes that are no features."""
    decoder: Tensor
    """[U, d]."""
    others: Sequence[tuple[Tensor, Tensor]]
    """For the error, and for a skip connection: e - e0 [B, S, d], and [B or 1, S, U] 1 where it is a node."""

    def seen(self, mask: Tensor) -> Tensor:
        """x with only the nodes of mask [G, U] away from their ablation value, [G, B, S, d]."""
        x = self.rest + (self.delta * mask[:, None, None, :]) @ self.decoder
        for moved, where in self.others:
            if where.any():
                x = x + torch.einsum("gu,bsu->gbs", mask, where)[..., None] * moved
        return x


@dataclass(frozen=True)
class _EdgeRun:
    """A batch of prompts in a model with only some edges: site by site, each node from what its parents show it."""

    study: _Study
    edges: CircuitEdges
    """The kept edges."""
    prompts: PromptSet
    clean: Mapping[Site, Tensor]
    """x [B, S, d] of every site in the whole model, and what is read for it."""
    ablated: Values
    moved: dict[Site, _Moved] = field(default_factory=dict)
    """The sites that are done."""

    def metric(self) -> Tensor:
        """m with the kept edges, [B]."""
        model, nodes = self.study.values.setting.model, self.study.nodes
        living = _reaching(self.edges, nodes)
        for site in nodes:
            self.moved[site] = self._site(site, living[site].nonzero()[:, 0])
        beyond = Site("resid", model.n_layers)
        masks = {up: mask for (up, down), mask in self.edges.items() if down is None}
        run = model.run(self.prompts.clean, skip=self._inputs(beyond, masks, n_groups=1), last_only=True)
        return self.study.values.setting.metric(run.logits[:, -1], self.prompts)

    def _parents(self, site: Site) -> dict[Site, Site]:
        setting = self.study.values.setting
        return setting.model.parents(site, [other for other in setting.saes if other < site])

    def _inputs(self, site: Site, masks: Mapping[Site, Tensor], *, n_groups: int) -> dict[Site, Tensor]:
        """The skip mapping with what every direct parent of a site shows to G groups of nodes, [G * B, S, d] each."""
        parents = self._parents(site)
        shown: dict[Site, Tensor] = {}
        for parent in set(parents.values()):
            if moved := self.moved.get(parent):
                mask = masks[parent] if parent in masks else moved.rest.new_zeros(n_groups, moved.delta.shape[-1])
                shown[parent] = moved.seen(mask.to(moved.rest)).flatten(0, 1)
            else:
                shown[parent] = self.clean[parent].repeat(n_groups, 1, 1)
        return {skipped: shown[parent] for skipped, parent in parents.items()}

    def _site(self, site: Site, living: Tensor) -> _Moved:
        """The nodes `living` of a site, each from its own inputs; the others stay at their ablation value."""
        sae, nodes, ablated = self.study.values.setting.saes[site], self.study.nodes[site], self.ablated[site]
        index = self.study.values.table.index[site]
        where = nodes.where(self.prompts).to(ablated.x)  # [B or 1, S, U]
        is_feature = nodes.is_feature.to(where.device)
        feature = nodes.feature.to(where.device).clamp(max=nodes.n_features - 1)
        column = torch.searchsorted(index, feature).clamp(max=max(len(index) - 1, 0))
        batch, n_positions = self.prompts.clean.input_ids.shape
        delta = ablated.x.new_zeros(batch, n_positions, len(nodes))
        error, skip = (ablated.x.new_zeros(batch, n_positions, ablated.x.shape[-1]) for _ in range(2))
        for members, y, y_read in self._outputs(site, living):
            features = members[nodes.is_feature[members]]
            if len(features):
                f = sae.encode_some(y_read, feature[features]) - ablated.features[..., column[features]]
                delta[..., features] = f.to(delta) * where[..., features]
            for number in members[nodes.is_error[members]].tolist():
                off = y - sae(y_read).to(y) - ablated.error
                error += off * where[..., number, None]
            for number in members[nodes.is_skip[members]].tolist():
                assert ablated.skip is not None
                skip += (sae.skip(y_read) - ablated.skip) * where[..., number, None]
        decoder = sae.W_dec[feature].to(delta) * is_feature[:, None]
        is_error, is_skip = (chosen.to(where.device) for chosen in (nodes.is_error, nodes.is_skip))
        others = [(error, where * is_error), (skip, where * is_skip)]
        return _Moved(ablated.x.expand(batch, n_positions, -1), delta, decoder, others)

    def _outputs(self, site: Site, living: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(numbers of the nodes that see the same inputs, the site's output for them [B, S, d], and what its dictionary
        reads for it).
        """
        read = self.study.values.setting.saes.config(site).read_site(site)
        if not len(living):
            return
        if not any(parent in self.moved for parent in self._parents(site).values()):
            yield living, self.clean[site], self.clean[read]
            return
        incoming = {up: mask[living] for (up, down), mask in self.edges.items() if down == site}
        widths = [mask.shape[1] for mask in incoming.values()]
        rows, group = living.new_zeros(1, 0).float(), torch.zeros_like(living)  # without any edge all see the same
        if widths:
            rows, group = torch.cat(list(incoming.values()), dim=1).unique(dim=0, return_inverse=True)  # [G, all U]
        model, clean = self.study.values.setting.model, self.prompts.clean
        per_pass = max(1, self.study.max_rows // len(self.prompts))
        for start in range(0, len(rows), per_pass):
            chunk = rows[start : start + per_pass]
            masks = dict(zip(incoming, chunk.split(widths, dim=1), strict=True))
            skip = self._inputs(site, masks, n_groups=len(chunk))
            run = model.run(clean.repeat(len(chunk)), capture={site, read}, skip=skip, need_logits=False)
            y, y_read = (run.activations[place].unflatten(0, (len(chunk), -1)) for place in (site, read))
            for number in range(len(chunk)):
                yield living[group == start + number], y[number], y_read[number]


def _reaching(edges: CircuitEdges, nodes: Nodes) -> dict[Site, Tensor]:
    """Nodes with a path of kept edges to the metric, [n] bool per site."""
    alive = {site: torch.zeros(len(site_nodes), dtype=torch.bool) for site, site_nodes in nodes.items()}
    for site in reversed(list(nodes)):
        for (up, down), mask in edges.items():
            if up == site:
                alive[site] |= (mask if down is None else mask[alive[down]]).any(0)
    return alive
