"""Attribution patching: the gradient at the clean run, for all sites from one pass.

Nanda 2023; Marks et al. 2024, eq. 3. Legend: B examples, S positions, d model width.

1. One forward pass of the clean prompts with the graph kept.
2. One backward pass from sum_b m_b: g = dm/dx at all sites at once.
3. effect = (f_patch - f_clean)_i * (W_dec[i] . g) (`circuits.attribution.feature_effects`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from circuits.attribution.activations import ActivationPair, clean_run
from sae.model.sites import Site


def attribution_patching(states: ActivationPair, *, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """dm/dx at the clean run, [B, S, d] per site: one forward and one backward pass for all sites."""
    return clean_run(states.setting, states.prompts, sites, gradient=True)[2] or {}
