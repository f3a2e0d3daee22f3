"""Gated: one path decides which features are active, another how much.

Rajamanoharan et al. 2024a, "Improving dictionary learning with gated sparse autoencoders" (arXiv 2404.16014). With
π = W_enc (x − b_dec):  gate π + gate_bias,  magnitude exp(r) · π + b_enc (tied weights, equation 7),
f = 1[gate > 0] · ReLU(magnitude) (equations 5 and 6); loss (equation 8)
  ‖x − x̂(f)‖² + λ Σ_i ReLU(gate_i) + ‖x − x̂_frozen(ReLU(gate))‖²,
the last term with W_dec and b_dec as constants, so that the gate learns to reconstruct but does not teach the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.activation_functions import GATED
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error, where_positive
from sae.sparse.activations import Acts


class Gated(Penalised):
    name = "gated"
    nonlinearity = GATED
    encoder_bias = None
    revival = "none"

    def extra_weights(self, n_features: int) -> dict[str, Tensor]:
        return {"gate_bias": torch.zeros(n_features), "r": torch.zeros(n_features)}

    def lowest(self, w: Weights, hyper: Hyper) -> Tensor:
        return -w["gate_bias"].detach()

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        gate = (z + acts.expand(w["gate_bias"])).relu_()
        magnitude = torch.addcmul(acts.expand(w["b_enc"]), acts.expand(w["r"].exp()), z).relu_()
        f = where_positive(magnitude, gate.detach())
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        x_hat_gate = acts.decode(gate, w["W_dec"].detach()) + w["b_dec"].detach()
        loss = squared_error(x, x_hat) + hyper.sparsity * gate.sum() + squared_error(x, x_hat_gate)
        return Losses(loss, x_hat, f)

    def export(self, w: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = super().export(w, state)
        return tensors | {"magnitude": tensors.pop("r").exp()}
