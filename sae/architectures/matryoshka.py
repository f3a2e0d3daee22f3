"""Matryoshka BatchTopK: nested prefixes of the dictionary each reconstruct the input, so early features stay general.

Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv 2503.17547),
section 3: loss Σ_m ‖x − x̂_m‖², x̂_m using the active features among the first M_m only; selection as in BatchTopK, over
all features at once. Here the mean over the prefixes, whose sizes are F/16, F/8, F/4, F/2 and F.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.architectures.base import Encoder, Hyper, Losses, Weights
from sae.architectures.batchtopk import BatchTopK
from sae.codes import SparseCode

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Ends of the prefixes before the last, as shares of the features."""


def prefix_ends(n_features: int) -> list[int]:
    """Sizes of the prefixes before the last."""
    return sorted({end for share in FRACTIONS if 0 < (end := round(share * n_features)) < n_features})


class Matryoshka(BatchTopK):
    name = "matryoshka"

    def select(self, encoder: Encoder, w: Weights, hyper: Hyper) -> SparseCode:
        code = super().select(encoder, w, hyper)
        ends = torch.tensor(prefix_ends(len(encoder.W_enc)), device=code.feature.device)
        return code.at_levels(torch.bucketize(code.feature, ends, right=True), n_levels=len(ends) + 1)

    def loss(self, z: Tensor, code: SparseCode, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        x_hats = code.decode(f, w["W_dec"]).cumsum(0) + w["b_dec"]  # [levels, N, d]
        loss = (x - x_hats).square().sum() / len(x_hats)
        return Losses(loss, x_hats[-1], f)
