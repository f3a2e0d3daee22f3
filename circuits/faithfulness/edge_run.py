"""The model with gates on edges: every node recomputed from what its open edges show it.

For every site, with C the nodes between which edges were computed and g(u, d) the gate of the edge u -> d, 1 where it
is kept, 0 where it is not, or anything between,

    x_p(d) = x0_p + sum_{u in C at p} g(u, d) (a_u - a0_u) W_dec[u]   (+ g(u, d) (e_u - e0_u) for an error node u)

is what node d sees of its direct parent p:

1. In forward order, a_d is read off the site's output computed from x_p(d) at all direct parents p. Nodes that see the
   same inputs are computed together, where gates are the same for all prompts; nodes without a path of open edges to
   the metric are not computed.
2. A site without parents in the circuit (the first one) has its clean values; so have the sites before it.
3. The metric's parents show it theirs like those of any other node.

Gradients flow from the logits to the gates where these ask for them.

Legend: B prompts, S positions, d model width, G groups of nodes with equal inputs, U upstream and D downstream nodes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from circuits.attribution.activations import Setting
from circuits.attribution.nodes import Nodes
from circuits.faithfulness.ablation import NodeTable, Values
from circuits.prompts.dataset import PromptSet
from sae.model.sites import Site

EdgeGates = Mapping[tuple[Site, Site | None], Tensor]
"""(upstream, downstream or None for the metric) -> the gate of every edge, [D, U], or [D, B, U] prompt by prompt."""


@dataclass(frozen=True)
class EdgeStudy:
    """The setting that all sets of edges and all batches share."""

    setting: Setting
    table: NodeTable
    """Which features the ablation values hold."""
    nodes: Nodes
    """The nodes between which edges were computed, in forward order."""
    max_rows: int
    """Prompts that go through the model at once."""


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

    def seen(self, gates: Tensor) -> Tensor:
        """x with every node as far from its ablation value as its gate [G, B or 1, U] lets it be, [G, B, S, d]."""
        x = self.rest + (self.delta * gates[:, :, None]) @ self.decoder
        for moved, where in self.others:
            if where.any():
                x = x + torch.einsum("gbu,bsu->gbs", gates, where)[..., None] * moved
        return x


@dataclass(frozen=True)
class EdgeRun:
    """A batch of prompts in a model with gates on edges: site by site, each node from what its parents show it."""

    study: EdgeStudy
    edges: EdgeGates
    prompts: PromptSet
    clean: Mapping[Site, Tensor]
    """x [B, S, d] of every site in the whole model, and what is read for it."""
    ablated: Values
    grad: bool = False
    """Whether gradients flow to the gates; then all nodes of a site go through the model at once."""
    moved: dict[Site, _Moved] = field(default_factory=dict)
    """The sites that are done."""

    def logits(self) -> Tensor:
        """Logits after every prompt, [B, V]."""
        model, nodes = self.study.setting.model, self.study.nodes
        living = reaching(self.edges, nodes)
        for site in nodes:
            self.moved[site] = self._site(site, living[site].nonzero()[:, 0])
        beyond = Site("resid", model.n_layers)
        gates = {up: _by_prompt(gate) for (up, down), gate in self.edges.items() if down is None}
        skip = self._inputs(beyond, gates, n_groups=1)
        return model.run(self.prompts.clean, skip=skip, grad=self.grad, last_only=True).logits[:, -1]

    def metric(self) -> Tensor:
        """m, [B]."""
        return self.study.setting.metric(self.logits(), self.prompts)

    def _parents(self, site: Site) -> dict[Site, Site]:
        setting = self.study.setting
        return setting.model.parents(site, [other for other in setting.saes if other < site])

    def _inputs(self, site: Site, gates: Mapping[Site, Tensor], *, n_groups: int) -> dict[Site, Tensor]:
        """The skip mapping with what every direct parent of a site shows to G groups of nodes, [G * B, S, d] each."""
        parents = self._parents(site)
        shown: dict[Site, Tensor] = {}
        for parent in set(parents.values()):
            if moved := self.moved.get(parent):
                gate = gates[parent] if parent in gates else moved.rest.new_zeros(n_groups, 1, moved.delta.shape[-1])
                shown[parent] = moved.seen(gate.to(moved.rest)).flatten(0, 1)
            else:
                shown[parent] = self.clean[parent].repeat(n_groups, 1, 1)
        return {skipped: shown[parent] for skipped, parent in parents.items()}

    def _site(self, site: Site, living: Tensor) -> _Moved:
        """The nodes `living` of a site, each from its own inputs; the others stay at their ablation value."""
        sae, nodes, ablated = self.study.setting.saes[site], self.study.nodes[site], self.ablated[site]
        index = self.study.table.index[site]
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
        setting, clean = self.study.setting, self.prompts.clean
        read = setting.saes.config(site).read_site(site)
        if not len(living):
            return
        if not any(parent in self.moved for parent in self._parents(site).values()):
            yield living, self.clean[site], self.clean[read]
            return
        incoming = {up: gate[living] for (up, down), gate in self.edges.items() if down == site}
        rows, group = _groups(list(incoming.values()), living)
        widths = [gate.shape[-1] for gate in incoming.values()]
        per_pass = len(rows) if self.grad else max(1, self.study.max_rows // len(self.prompts))
        for start in range(0, len(rows), per_pass):
            chunk = rows[start : start + per_pass]
            gates = dict(zip(incoming, chunk.split(widths, dim=-1), strict=True))
            skip = self._inputs(site, gates, n_groups=len(chunk))
            run = setting.model.run(
                clean.repeat(len(chunk)), capture={site, read}, skip=skip, grad=self.grad, need_logits=False
            )
            y, y_read = (run.activations[where].unflatten(0, (len(chunk), -1)) for where in (site, read))
            for number in range(len(chunk)):
                yield living[group == start + number], y[number], y_read[number]


def _by_prompt(gates: Tensor) -> Tensor:
    """[D, U] or [D, B, U] -> [D, 1 or B, U]."""
    return gates[:, None] if gates.ndim == 2 else gates


def _groups(incoming: Sequence[Tensor], living: Tensor) -> tuple[Tensor, Tensor]:
    """The gates of nodes' incoming edges, one row for those with the same, [G, B or 1, all U]; and which row is each
    node's. Without any incoming edge all see the same; gates that differ between prompts are one row a node.
    """
    if not incoming:
        return living.new_zeros(1, 1, 0).float(), torch.zeros_like(living)
    rows = torch.cat(list(incoming), dim=-1)
    if rows.ndim == 3:
        return rows, torch.arange(len(rows), device=living.device)
    rows, group = rows.unique(dim=0, return_inverse=True)
    return _by_prompt(rows), group


def reaching(edges: EdgeGates, nodes: Nodes) -> dict[Site, Tensor]:
    """Nodes with a path of open edges to the metric, [n] bool per site."""
    alive = {site: torch.zeros(len(site_nodes), dtype=torch.bool) for site, site_nodes in nodes.items()}
    for site in reversed(list(nodes)):
        for (up, down), gate in edges.items():
            if up == site:
                into_living = gate if down is None else gate[alive[down]]
                alive[site] |= into_living.flatten(0, -2).any(0).cpu()
    return alive
