"""Exact edge effects by path patching, which edge weights estimate: one forward pass a node and one an edge.

The exact effect of the edge u -> d (Goldowsky-Dill et al. 2023, direct path only, over features and error nodes):

1. One forward pass of the clean prompts in which every site gives on its clean value, except u's, which gives on
   x + (f_patch - f_clean)_u W_dec[u] (for the error node: x + e_patch - e_clean). What every later site d computes
   there differs from the clean run by what u does to it directly.
2. That changes the node d by delta_d = f_d(what was computed) - f_d(clean), or the error in the same way.
3. A second run: the clean prompts with x + delta_d W_dec[d] at d's site and everything after it as it follows.

    effect(u -> d) = m(second run) - m(clean)

The metric is a downstream node too: there the metric of the first run is the second run's. Positions: as in
`circuits.attribution.edges`, a node of position -1 is changed at all positions at once, any other at its own or its
span's.

This is noising: from clean to patch. `ActivationPair.reversed()` gives denoising, whose effects have the opposite
sign; edge weights with the gradient of integrated gradients estimate the mean of both.

Legend: B prompts, S positions, d model width, n nodes of a site, U upstream and D downstream nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.edges import Edges
from circuits.attribution.nodes import Nodes, SiteNodes
from sae.autoencoder import SparseAutoencoder
from sae.model.hook_points import SiteEdit
from sae.model.sites import Site


@torch.no_grad()
def path_effects(states: ActivationPair, nodes: Nodes, *, max_rows: int = 512) -> Edges:
    """Exact effects of all edges among `nodes` and to the metric, summed over the batch's examples.

    `nodes` names every site that counts as a node's site, also those without a node: what is between two of them is
    direct. Pairs of sites without a direct path are in the result as zeros.
    """
    sites = list(nodes)
    batch = len(states.tokens)
    copies = max(1, max_rows // batch)
    of_site = {site: _Node(states.setting.saes[site], states, site, here) for site, here in nodes.items() if len(here)}
    edges: Edges = {}
    for up in of_site:
        later = [site for site in sites if site > up]
        targets = [site for site in later if site in of_site]
        for down in [*targets, None]:
            n_down = 1 if down is None else len(nodes[down])
            edges[up, down] = torch.zeros(n_down, len(nodes[up]), dtype=torch.float64)
        for first in range(0, len(nodes[up]), copies):
            columns = range(first, min(first + copies, len(nodes[up])))
            x = torch.cat([states.clean[up] + of_site[up].change(column) for column in columns])
            outputs, m = _pinned_run(states, up, x, later, copies=len(columns))
            for copy, column in enumerate(columns):
                rows = slice(copy * batch, (copy + 1) * batch)
                edges[up, None][0, column] = (m[rows] - states.m_clean).double().sum().item()
                for down in targets:
                    read = states.setting.saes.config(down).read_site(down)
                    changes = of_site[down].changes(outputs[down][rows], outputs[read][rows])
                    edges[up, down][:, column] = _effects(states, down, changes, max_rows)
    return {pair: weights.float() for pair, weights in edges.items()}


class _Node:
    """The nodes of one site, as what is changed and as what is read."""

    def __init__(self, sae: SparseAutoencoder, states: ActivationPair, site: Site, nodes: SiteNodes) -> None:
        self.sae, self.n_features = sae, nodes.n_features
        self.feature = nodes.feature.to(sae.W_dec.device)
        of_site = states.of_site(site)
        self.clean_values = self._values(of_site.clean, of_site.read_clean)
        patch = [torch.zeros_like(value) for value in self.clean_values]
        if not states.zero_patch:
            patch = list(self._values(of_site.patch, of_site.read_patch))
        is_there = nodes.where(states.prompts).to(self.feature.device)  # [B or 1, S, n]
        self.is_there = (is_there & states.mask.to(is_there.device)[..., None]).movedim(-1, 0)[
            ..., None
        ]  # [n, B, S, 1]
        self.deltas = self._deltas(patch)

    def _values(self, x: Tensor, x_read: Tensor) -> tuple[Tensor, ...]:
        """(f [B, S, n] of this site's features, e [B, S, d], what a skip connection writes [B, S, d]) of x [B, S, d],
        and of what is read for it [B, S, r].
        """
        features = self.feature.clamp(max=self.n_features - 1)
        f, x_hat = self.sae.encode_and_reconstruct(x_read, features)
        error = x.to(x_hat) - x_hat
        return f, error, self.sae.skip(x_read) if self.sae.has_skip else torch.zeros_like(error)

    def _deltas(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [value - clean for value, clean in zip(values, self.clean_values, strict=True)]

    def change(self, node: int) -> Tensor:
        """The change of x when the node goes from clean to patch, [B, S, d]."""
        return self._written(node, self.deltas)

    def changes(self, y: Tensor, y_read: Tensor) -> list[Tensor]:
        """The change of x by each node when the site computes y [B, S, d] in place of the clean x, and the site that
        its dictionary reads y_read; [B, S, d] each.
        """
        deltas = self._deltas(self._values(y, y_read))
        return [self._written(node, deltas) for node in range(len(self.feature))]

    def _written(self, node: int, deltas: Sequence[Tensor]) -> Tensor:
        feature, f_delta = int(self.feature[node]), deltas[0]
        if feature >= self.n_features:
            return deltas[1 + feature - self.n_features] * self.is_there[node]
        return f_delta[..., node, None] * self.sae.W_dec[feature] * self.is_there[node]


def _pinned_run(
    states: ActivationPair, up: Site, x: Tensor, later: Sequence[Site], *, copies: int
) -> tuple[dict[Site, Tensor], Tensor]:
    """The outputs of every later site, [copies * B, S, d], what its dictionary reads, and the metric [copies * B], when
    `up` gives on x [copies * B, S, d] and all other sites their clean values.
    """
    model = states.setting.model
    outputs: dict[Site, Tensor] = {}

    def pinned(site: Site) -> SiteEdit:
        def edit(y: Tensor) -> Tensor:
            outputs[site] = y
            return states.clean[site].repeat(copies, 1, 1)

        return edit

    skip = model.resume_from(up, {site: states.clean[site].repeat(copies, 1, 1) for site in states.sites if site < up})
    edits = {site: pinned(site) for site in later}
    reads = {read for site, read in states.setting.saes.read_sites(later).items() if read != site}
    tokens = states.tokens.repeat(copies)
    run = model.run(tokens, skip=skip | {up: x}, edits=edits, capture=reads, last_only=True)
    outputs |= run.activations
    return outputs, states.metric_of_copies(run.logits).flatten()


def _effects(states: ActivationPair, site: Site, changes: Sequence[Tensor], max_rows: int) -> Tensor:
    """Sum over prompts of m(x + change) - m(clean) for each change [B, S, d] at a site; prompts whose change is lost
    in the rounding of x are not run. [n]
    """
    total = torch.zeros(len(changes), dtype=torch.float64)
    stacked = torch.stack(list(changes))  # [n, B, S, d]
    rounding = 4 * torch.finfo(stacked.dtype).eps * states.clean[site].abs().amax((1, 2))  # [B]
    node, owner = (stacked.abs().amax((2, 3)) > rounding).nonzero(as_tuple=True)
    for part in range(0, len(node), max_rows):
        here, row = node[part : part + max_rows], owner[part : part + max_rows]
        x = states.clean[site][row]
        x = x + stacked[here, row].to(x.dtype)
        effect = states.metric_of_rows(site, x, row) - states.m_clean[row]
        total.index_add_(0, here.cpu(), effect.double().cpu())
    return total
