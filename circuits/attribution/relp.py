"""RelP: attribution patching with relevance propagation in place of the gradient.

Jafari et al. 2025 (arXiv 2508.21258). The gradient at the clean run sees only the slope of every nonlinearity; the
rules of `sae.model.lrp` replace it by what a linear model with the same values would have:

1. One forward and one backward pass of the clean prompts under these rules: g at all sites at once.
2. effect = (f_patch - f_clean)_i * (W_dec[i] . g), as in attribution patching, at the same cost.

It estimates exact noising (clean -> patch). Published gains are on deep models; see the README for where it wins.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.attribution_patching import attribution_patching
from sae.model.lrp import check_conserved, relevance_rules
from sae.model.sites import Site


def relevance_patching(states: ActivationPair, *, sites: Sequence[Site]) -> dict[Site, Tensor]:
    """The propagation coefficient that takes the place of dm/dx at the clean run, [B, S, d] per site."""
    check_conserved(states.setting.model)
    with relevance_rules(states.setting.model.hf):
        return attribution_patching(states, sites=sites)
