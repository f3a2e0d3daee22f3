"""Matryoshka BatchTopK: nested prefixes of the dictionary each reconstruct the input, so early features stay general.

Bussmann et al. 2025, "Learning multi-level features with Matryoshka sparse autoencoders" (arXiv 2503.17547),
section 3: loss Σ_m ‖x − x̂_m‖², x̂_m using the active features among the first M_m only; selection as in BatchTopK, over
all features at once. Here the mean over the prefixes, whose sizes are F/16, F/8, F/4, F/2 and F.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sae.architectures.base import Hyper, Losses, Weights
from sae.architectures.batchtopk import BatchTopK
from sae.sparse.activations import Acts, SparseActs
from sae.sparse.encoder_pass import EncoderPass

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Ends of the prefixes before the last, as shares of the features."""


def prefix_ends(n_features: int) -> list[int]:
    """Sizes of the prefixes before the last."""
    return sorted({end for share in FRACTIONS if 0 < (end := round(share * n_features)) < n_features})


class Matryoshka(BatchTopK):
    name = "matryoshka"

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        acts = super().select(encoder, w, hyper)
        ends, level = prefix_ends(len(encoder.W_enc)), torch.zeros_like(acts.feature)
        for end in ends:
            level += acts.feature >= end
        return acts.at_levels(level, n_levels=len(ends) + 1)

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        loss, x_hat = _NestedError.apply(acts.decode(f, w["W_dec"]), w["b_dec"], x)
        return Losses(loss, x_hat, f)


class _NestedError(torch.autograd.Function):
    """(mean over m of Σ_t ‖x̂_m − x‖², x̂ of the last) with x̂_m = b_dec + Σ_{l ≤ m} out_l from out [levels, N, d].

    The gradient of out_l is 2 / levels · Σ_{m ≥ l} (x̂_m − x): running sums, in place.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, b_dec: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.error = out.cumsum(0).add_(b_dec - x)  # [levels, N, d]
        x_hat = ctx.error[-1] + x
        ctx.mark_non_differentiable(x_hat)
        flat = ctx.error.flatten()
        return torch.dot(flat, flat) / len(out), x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:  # type: ignore[override]
        error = ctx.error
        for level in reversed(range(len(error) - 1)):
            error[level].add_(error[level + 1])
        d_out = error.mul_(2 / len(error) * g)
        return d_out, d_out[0].sum(0), -d_out[0] if ctx.needs_input_grad[2] else None
