"""p-annealing: a penalty Σ f^p whose exponent falls from 1 towards 0, from the L1 norm to a count of what is active.

Karvonen et al. 2024, "Measuring progress in dictionary learning" (arXiv 2408.00113), section 3.2:
loss ‖x − x̂‖² + λ_s Σ_i f_i^{p_s}, p_s falling linearly, λ_s rescaled when p changes so that the penalty does not jump;
here λ follows the wanted L0, which does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error
from sae.codes import SparseCode
from sae.dense import DenseChunk, DenseParts, mask_, positive
from sae.nonlinearities import RELU

SMALLEST = 1e-3
"""Activations below this are penalised as if they had this size: the slope of f^p is not bounded at zero."""


class PAnneal(Penalised):
    name = "p_anneal"
    nonlinearity = RELU
    n_buffers = 3

    def loss(self, z: Tensor, code: SparseCode, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        x_hat = code.decode(f, w["W_dec"]) + w["b_dec"]
        # tangent of f^p at the present f, so that small activations still feel a pull
        slope = hyper.p * f.detach().clamp(min=SMALLEST) ** (hyper.p - 1)
        return Losses(squared_error(x, x_hat) + hyper.sparsity * (slope * f).sum(), x_hat, f)

    def dense(self, z: Tensor, chunk: DenseChunk, w: Weights, hyper: Hyper) -> DenseParts:
        f = z.relu_()
        fired = positive(f, chunk.buffer(1))
        df, squared = chunk.decode(f, 1)
        slope = torch.clamp(f, min=SMALLEST, out=chunk.buffer(2)).pow_(hyper.p - 1).mul_(hyper.sparsity * hyper.p)
        penalty = torch.dot(slope.flatten(), f.flatten())
        return DenseParts(mask_(df.add_(slope.div_(chunk.n_tokens)), f), penalty, squared, fired)
