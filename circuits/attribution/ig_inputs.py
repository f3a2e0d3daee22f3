"""Integrated gradients along the embedding path: all sites from the same passes.

EAP-IG in its inputs variant (Hanna et al. 2024, arXiv 2403.17806). Legend: B examples, S positions, d width, K nodes.

1. Put (1 - a_k) x_clean + a_k x_patch at the embedding, for the quadrature nodes a_k; everything after it recomputes.
2. One forward and one backward pass of the K * B rows gives dm/dx at every site.
3. g = sum_k w_k dm/dx, and effect = (f_patch - f_clean)_i * (W_dec[i] . g).

K passes in all instead of K a site. The effects of the embedding add up to m(patch) - m(clean), as in `ig`; at later
sites the path is the one the model makes of it and not a straight line, so there the sum check holds only roughly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.integrated_gradients import path_chunks
from circuits.options import Rule
from sae.errors import UserError
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site

EMBED = Site("embed")


@torch.enable_grad()
def integrated_gradients_of_inputs(
    states: ActivationPair, *, sites: Sequence[Site], rule: Rule = "midpoint", steps: int = 10, max_rows: int = 512
) -> dict[Site, Tensor]:
    """Weighted mean of dm/dx along the embedding path, [B, S, d] per site."""
    clean, patch = _embeddings(states)
    total = {site: torch.zeros_like(states.clean[site], dtype=torch.float32) for site in sites}
    for weight, leaf in path_chunks(clean, patch, rule, steps, max_rows):
        tokens = states.tokens.repeat(len(weight))
        run = states.setting.model.run(tokens, skip={EMBED: leaf}, capture=sites, grad=True, last_only=True)
        m = states.metric_of_copies(run.logits)  # [K, B]
        gradients = run.gradients(m.sum(), sites)
        for site, gradient in zip(sites, gradients, strict=True):
            total[site] += torch.einsum("k,kbsd->bsd", weight, gradient.unflatten(0, (len(weight), -1)).float())
    return total


def _embeddings(states: ActivationPair) -> tuple[Tensor, Tensor]:
    """Embeddings of the clean and the patch prompts, [B, S, d]; zero for the latter where there are none."""
    if EMBED in states.clean:
        return states.clean[EMBED], states.patch[EMBED]
    model = states.setting.model
    check_embedding(model)

    def embedding(tokens: Tokens) -> Tensor:
        return model.run(tokens, capture=[EMBED], need_logits=False).activations[EMBED]

    clean = embedding(states.tokens)
    return clean, torch.zeros_like(clean) if states.prompts.patch is None else embedding(states.prompts.patch)


def check_embedding(model: LanguageModel) -> None:
    """`UserError` for a model without the site that the path begins at."""
    if EMBED not in model.sites:
        raise UserError(f"method 'ig-inputs' needs the site 'embed', which model {model.name!r} does not have: use ig")
