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
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error
from sae.sparse.activations import SparseActs
from sae.sparse.dense import DenseChunk, DenseParts, mask_, positive


class Gated(Penalised):
    name = "gated"
    nonlinearity = GATED
    n_buffers = 3
    encoder_bias = None
    revival = "none"

    def own_weights(self, n_features: int) -> dict[str, Tensor]:
        return {"gate_bias": torch.zeros(n_features), "r": torch.zeros(n_features)}

    def lowest(self, w: Weights, hyper: Hyper) -> Tensor:
        return -w["gate_bias"].detach()

    def loss(self, z: Tensor, code: SparseActs, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        gate = (z + code.expand(w["gate_bias"])).relu()
        magnitude = (code.expand(w["r"].exp()) * z + code.expand(w["b_enc"])).relu()
        f = magnitude * (gate > 0)
        x_hat = code.decode(f, w["W_dec"]) + w["b_dec"]
        x_hat_gate = code.decode(gate, w["W_dec"].detach()) + w["b_dec"].detach()
        loss = squared_error(x, x_hat) + hyper.sparsity * gate.sum() + squared_error(x, x_hat_gate)
        return Losses(loss, x_hat, f)

    def dense(self, z: Tensor, chunk: DenseChunk, w: Weights, hyper: Hyper) -> DenseParts:
        scale, bias = w["r"].exp(), w["b_enc"]
        gate = torch.add(z, w["gate_bias"], out=chunk.buffer(1)).relu_()
        penalty = hyper.sparsity * gate.sum()
        dz, squared_gate = chunk.decode(gate, 2, constant=True)
        dz = mask_(dz.add_(hyper.sparsity / chunk.n_tokens), gate)  # ∂L/∂gate so far
        chunk.add("gate_bias", dz.sum(0))
        f = mask_(torch.addcmul(bias, z, scale, out=z), gate).relu_()
        fired = positive(f, gate)  # which is not needed any more
        df, squared = chunk.decode(f, 1)
        df = mask_(df, f)
        df_sum = df.sum(0)
        dz.addcmul_(df, scale)
        chunk.add("b_enc", df_sum)
        chunk.add("r", f.mul_(df).sum(0) - bias * df_sum)  # exp(r) z = f − b_enc where f > 0
        return DenseParts(dz, penalty + squared_gate, squared, fired)

    def export(self, w: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tensors = {name: tensor.detach() for name, tensor in w.items()}
        return tensors | {"magnitude": tensors.pop("r").exp()}
