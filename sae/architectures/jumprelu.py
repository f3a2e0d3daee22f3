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
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error, where_positive
from sae.sparse.activations import Acts

INITIAL_THRESHOLD = 0.001
THRESHOLD_RATE = 0.3
"""Learning rate of thresholds relative to that of the weights: at the same rate a threshold crosses the whole spread of
its pre-activations within a few dozen steps, and features die behind it."""


class JumpReLU(Penalised):
    name = "jumprelu"
    nonlinearity = JUMPRELU
    rates: ClassVar = {"threshold": THRESHOLD_RATE}
    subtract_b_dec = False
    damping = 2.0  # thresholds that rose too far come back slowly

    def extra_weights(self, n_features: int) -> dict[str, Tensor]:
        return {"threshold": torch.full((n_features,), INITIAL_THRESHOLD)}

    def lowest(self, w: Weights, hyper: Hyper) -> Tensor:
        return w["threshold"].detach() - hyper.bandwidth / 2

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        threshold = acts.expand(w["threshold"])
        f, step = _Jump.apply(z, threshold, hyper.bandwidth)
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        if hyper.target_l0 is None:
            penalty = acts.over_all_features(step.sum())
        else:
            l0 = acts.decode(step, torch.ones_like(w["b_enc"][:, None]))  # [N, 1]
            penalty = (l0 / hyper.target_l0 - 1).square().sum()
        return Losses(squared_error(x, x_hat) + hyper.sparsity * penalty, x_hat, f)

    def constrain(self, w: Weights) -> None:
        w["threshold"].clamp_(min=0)


class _Jump(torch.autograd.Function):
    """z · H(z − θ) and H(z − θ), the step, with the pseudo-derivatives of the paper."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        distance = z - threshold
        ctx.save_for_backward(distance, threshold)
        ctx.bandwidth = bandwidth
        return where_positive(z, distance), torch.gt(distance, 0, out=torch.empty_like(z))

    @staticmethod
    def backward(ctx: Any, df: Tensor, d_step: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        distance, threshold = ctx.saved_tensors
        dz = where_positive(df, distance)
        near = torch.lt(distance.abs(), ctx.bandwidth / 2, out=torch.empty_like(distance))  # K((z − θ)/ε)
        pull = near.mul_(torch.addcmul(d_step, df, threshold)).sum_to_size(threshold.shape)
        return dz, -pull / ctx.bandwidth, None
