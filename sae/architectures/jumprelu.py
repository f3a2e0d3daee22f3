"""JumpReLU: each feature has a threshold, learnt through a straight-through estimate of the L0 penalty.

Rajamanoharan et al. 2024b, "Jumping ahead" (arXiv 2407.14435): f = z · H(z − θ) with z = W_enc x + b_enc, θ ≥ 0 and H
the step function (equation 5), loss ‖x − x̂‖² + λ Σ_i H(z_i − θ_i) (equation 9). Pseudo-derivatives with respect to θ
(equations 11 and 12), K the rectangle of width 1 and ε the bandwidth:
  ∂f/∂θ = −(θ/ε) K((z − θ)/ε),   ∂H/∂θ = −(1/ε) K((z − θ)/ε);
z gets the ordinary derivative of the loss, none from the step. The step is taken on the pre-activation.

With `Hyper.target_l0` the penalty is instead the paper's for a wanted L0, λ (Σ_i H(z_i − θ_i) / L0_target − 1)² for
each token, with the same pseudo-derivatives.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from sae.activation_functions import JUMPRELU
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error
from sae.sparse.activations import SparseActs
from sae.sparse.dense import DenseChunk, DenseParts, mask_

INITIAL_THRESHOLD = 0.001
THRESHOLD_RATE = 0.3
"""Learning rate of thresholds relative to that of the weights: at the same rate a threshold crosses the whole spread of
its pre-activations within a few dozen steps, and features die behind it."""


class JumpReLU(Penalised):
    name = "jumprelu"
    nonlinearity = JUMPRELU
    rates: ClassVar = {"threshold": THRESHOLD_RATE}
    n_buffers = 3
    subtract_b_dec = False
    damping = 2.0  # thresholds that rose too far come back slowly

    def own_weights(self, n_features: int) -> dict[str, Tensor]:
        return {"threshold": torch.full((n_features,), INITIAL_THRESHOLD)}

    def lowest(self, w: Weights, hyper: Hyper) -> Tensor:
        return w["threshold"].detach() - hyper.bandwidth / 2

    def loss(self, z: Tensor, code: SparseActs, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        threshold = code.expand(w["threshold"])
        f = _Jump.apply(z, threshold, hyper.bandwidth)
        x_hat = code.decode(f, w["W_dec"]) + w["b_dec"]
        step = _Step.apply(z, threshold, hyper.bandwidth)
        if hyper.target_l0 is None:
            penalty = step.sum()
        else:
            l0 = code.decode(step, torch.ones_like(w["b_enc"][:, None]))  # [N, 1]
            penalty = (l0 / hyper.target_l0 - 1).square().sum()
        return Losses(squared_error(x, x_hat) + hyper.sparsity * penalty, x_hat, f)

    def dense(self, z: Tensor, chunk: DenseChunk, w: Weights, hyper: Hyper) -> DenseParts:
        threshold, bandwidth = w["threshold"], hyper.bandwidth
        distance = torch.sub(z, threshold, out=chunk.buffer(1))
        f = mask_(z, distance)  # positive where z > θ, for θ ≥ 0
        near = torch.lt(distance.abs_(), bandwidth / 2, out=distance)  # K((z − θ)/ε), as numbers
        step = torch.gt(f, 0, out=chunk.buffer(2))
        fired = step.sum(0)
        if hyper.target_l0 is None:
            penalty, crossing = fired.sum(), near.sum(0)  # crossing: Σ_t K ∂penalty/∂H
        else:
            excess = step.sum(1) / hyper.target_l0 - 1  # [n]
            penalty, crossing = excess.square().sum(), (2 / hyper.target_l0 * excess) @ near
        df, squared = chunk.decode(f, 2)
        pull = near.mul_(df).sum(0)  # Σ_t K ∂L/∂f
        chunk.add("threshold", -(threshold * pull + hyper.sparsity / chunk.n_tokens * crossing) / bandwidth)
        return DenseParts(mask_(df, f), hyper.sparsity * penalty, squared, fired)

    def constrain(self, w: Weights) -> None:
        w["threshold"].clamp_(min=0)


def near(z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """K((z − θ)/ε)."""
    return ((z - threshold).abs() < bandwidth / 2).to(z.dtype)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        d_threshold = -(threshold / ctx.bandwidth) * near(z, threshold, ctx.bandwidth) * g
        return g * (z > threshold), d_threshold.sum_to_size(threshold.shape), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[None, Tensor, None]:  # type: ignore[override]
        z, threshold = ctx.saved_tensors
        d_threshold = -near(z, threshold, ctx.bandwidth) / ctx.bandwidth * g
        return None, d_threshold.sum_to_size(threshold.shape), None
