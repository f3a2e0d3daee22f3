"""ReLU with an L1 penalty, in its two published forms.

- `ReLU`: Anthropic, "Circuits updates, April 2024" (transformer-circuits.pub/2024/april-update, "Update on how we train
  SAEs"): loss ‖x − x̂‖² + λ Σ_i f_i ‖W_dec[i]‖, decoder rows free, b_dec not subtracted from the input.
- `ReLUUnit`: Bricken et al. 2023, "Towards monosemanticity": loss ‖x − x̂‖² + λ Σ_i f_i, decoder rows of unit norm
  (gradients along the rows removed), f = ReLU(W_enc (x − b_dec) + b_enc).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.activation_functions import RELU
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error
from sae.sparse.activations import SparseActs
from sae.sparse.dense import DenseChunk, DenseParts, mask_, positive


class ReLU(Penalised):
    name = "relu"
    nonlinearity = RELU
    unit_decoder = False
    subtract_b_dec = False
    decoder_norm = 0.1

    def loss(self, z: Tensor, code: SparseActs, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        x_hat = code.decode(f, w["W_dec"]) + w["b_dec"]
        penalty = (code.sum_tokens(f) * w["W_dec"].norm(dim=1)).sum()
        return Losses(squared_error(x, x_hat) + hyper.sparsity * penalty, x_hat, f)

    def dense(self, z: Tensor, chunk: DenseChunk, w: Weights, hyper: Hyper) -> DenseParts:
        f = z.relu_()
        fired, total = positive(f, chunk.buffer(1)), f.sum(0)
        norms = torch.linalg.vector_norm(w["W_dec"], dim=1)
        df, squared = chunk.decode(f, 1)
        weight = hyper.sparsity / chunk.n_tokens
        slope = weight * total / norms.clamp(min=1e-12)  # along the rows, from ‖W_dec[i]‖
        chunk.gradients["W_dec"].addcmul_(w["W_dec"], slope[:, None])
        return DenseParts(mask_(df.add_(weight * norms), f), hyper.sparsity * (total @ norms), squared, fired)


class ReLUUnit(Penalised):
    name = "relu_unit"
    nonlinearity = RELU

    def loss(self, z: Tensor, code: SparseActs, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        x_hat = code.decode(f, w["W_dec"]) + w["b_dec"]
        return Losses(squared_error(x, x_hat) + hyper.sparsity * f.sum(), x_hat, f)

    def dense(self, z: Tensor, chunk: DenseChunk, w: Weights, hyper: Hyper) -> DenseParts:
        f = z.relu_()
        fired, penalty = positive(f, chunk.buffer(1)), hyper.sparsity * f.sum()
        df, squared = chunk.decode(f, 1)
        return DenseParts(mask_(df.add_(hyper.sparsity / chunk.n_tokens), f), penalty, squared, fired)
