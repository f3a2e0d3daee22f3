"""Two rankings that know nothing of the metric, which every method must beat.

- `activation-difference`: |f_patch - f_clean| of a feature and |e_patch - e_clean|_2 of the error, which are the
  lengths of what the two write, decoder rows having unit norm. No gradient, no run of the model beyond the two ends.
- `random`: a normal number for every node that differs between the clean and the patch run, the same one in every
  batch, spread evenly over the entries of the node.
"""

from __future__ import annotations

import zlib

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import SiteEffects, sparse_effects
from sae.model.sites import Site


@torch.no_grad()
def activation_difference(states: ActivationPair, *, site: Site) -> SiteEffects:
    """How far each feature, the error and a skip connection's part move between clean and patch, at every position."""

    def values(delta: Tensor, error: Tensor, skip: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        return delta.abs_(), error.norm(dim=-1), None if skip is None else skip.norm(dim=-1)

    return sparse_effects(states.setting.saes[site], states.of_site(site), values, mask=states.mask)


def random_effects(states: ActivationPair, *, site: Site, positions: Tensor | None, seed: int = 0) -> SiteEffects:
    """A random effect for every node that differs; tokens with equal `positions` [B, S] are one node, None: all are."""
    live = activation_difference(states, site=site)
    n_nodes = live.n_nodes
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {site.name}".encode()))
    if positions is None:
        node, drawn = live.feature.long(), torch.randn(n_nodes, generator=generator)
    else:
        live = live.at_positions(positions, states.tokens.lengths)
        node = live.position.long() * n_nodes + live.feature.long()
        n_positions = max(len(states.prompts.spans), states.mask.shape[1])
        drawn = torch.randn(n_positions * n_nodes, generator=generator)
    share = len(states.mask) / node.bincount(minlength=len(drawn))[node]
    return SiteEffects(live.n_features, live.example, live.position, live.feature, drawn[node] * share)
