"""Resampling of dead features (Bricken et al. 2023, "Towards monosemanticity", appendix "Neuron resampling").

They start again in directions that are badly reconstructed. Tokens are drawn with probability proportional to the
square of their loss ‖x − x̂‖², here of one batch; a dead feature's decoder row becomes the unit vector along such a
token's error, its encoder row the same direction with `share` times the mean norm of the living encoder rows, its bias
zero, and the optimizer's moments of all of them zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RESAMPLE_AT = (0.1, 0.2, 0.3, 0.4)
"""Shares of the run after which dead features are resampled, where that is asked for."""
RESAMPLED_ENCODER = 0.2
"""Norm of a resampled encoder row, relative to the living ones; 1 where features compete for k places."""


@torch.no_grad()
def resample(
    weights: Mapping[str, Tensor],
    moments: Mapping[Tensor, Mapping[str, Any]],
    dead: Tensor,
    error: Tensor,
    *,
    share: float,
    seed: int,
) -> None:
    """Gives the features `dead` [n] new rows from errors x − x̂ [N, d] of a batch."""
    generator = torch.Generator().manual_seed(seed)
    chance = error.square().sum(1).square().cpu()  # [N]
    token = torch.multinomial(chance.clamp(min=1e-12), len(dead), replacement=True, generator=generator)
    direction = torch.nn.functional.normalize(error[token.to(error.device)], dim=1)  # [n, d]
    alive = torch.ones(len(weights["W_enc"]), dtype=torch.bool, device=dead.device).index_fill_(0, dead, False)
    norm = {name: weights[name][alive].norm(dim=1).mean() if alive.any() else 1.0 for name in ("W_enc", "W_dec")}
    rows = {"W_dec": direction * norm["W_dec"], "W_enc": direction * share * norm["W_enc"]}
    rows["b_enc"] = torch.zeros_like(weights["b_enc"][dead])
    for name, row in rows.items():
        weights[name][dead] = row
        for moment in moments.get(weights[name], {}).values():
            if moment.shape == weights[name].shape:
                moment[dead] = 0
