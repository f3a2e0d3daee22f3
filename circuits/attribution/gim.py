"""GIM: attribution patching whose backward pass sees through saturated attention (Edin et al. 2025, arXiv 2505.17630).

1. One forward and one backward pass of the clean prompts under the rules of `sae.model.gim`: g at all sites at once.
2. effect = (f_patch - f_clean)_i * (W_dec[i] . g), as in attribution patching, at the same cost.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.attribution_patching import attribution_patching
from sae.model.gim import check_covered, gim_rules
from sae.model.sites import Site


def gim_patching(states: ActivationPair, *, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The gradient under GIM's rules, in place of dm/dx at the clean run, [B, S, d] per site."""
    check_covered(states.setting.model)
    with gim_rules(states.setting.model.hf):
        return attribution_patching(states, sites=sites)
