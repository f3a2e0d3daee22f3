"""p-annealing: a penalty Σ f^p whose exponent falls from 1 towards 0, from the L1 norm to a count of what is active.

Karvonen et al. 2024, "Measuring progress in dictionary learning" (arXiv 2408.00113), section 3.2:
loss ‖x − x̂‖² + λ_s Σ_i f_i^{p_s}, p_s falling linearly. A fixed λ is rescaled as p changes, so that the penalty does
not jump: λ_{s+1} = λ_s Σ f^{p_s} / Σ f^{p_{s+1}}, summed over tokens and features, here of a part of the batch of step
s. By default λ follows the wanted L0, which does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.activation_functions import RELU
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error
from sae.sparse.activations import Acts
from sae.sparse.encoder_pass import above, linear

SMALLEST = 1e-3
"""Activations below this are penalised as if they had this size: the slope of f^p is not bounded at zero."""
RESCALED_ON = 512
"""Tokens of a batch that the weight is rescaled on."""


class PAnneal(Penalised):
    name = "p_anneal"
    nonlinearity = RELU
    weak = 0.05

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu_()
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        # f^p with a slope that is bounded, p f^(p-1): small activations still feel a pull
        base = f.detach().clamp(min=SMALLEST) ** (hyper.p - 1)
        total = torch.dot(base.flatten(), f.flatten())
        penalty = hyper.p * total + (1 - hyper.p) * total.detach()
        return Losses(squared_error(x, x_hat) + hyper.sparsity * penalty, x_hat, f)

    @torch.no_grad()
    def rescaling(self, x: Tensor, w: Weights, hyper: Hyper, following: Hyper) -> Tensor:
        f = above(linear(x[:RESCALED_ON] - w["b_dec"], w["W_enc"], w["b_enc"])).z
        now, then = (f**hyper.p).sum(), (f**following.p).sum()
        return torch.where(then > 0, now / then, 1.0)
