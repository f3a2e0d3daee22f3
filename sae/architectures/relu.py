"""ReLU with an L1 penalty, in its two published forms.

- `ReLU`: Anthropic, "Circuits updates, April 2024" (transformer-circuits.pub/2024/april-update, "Update on how we train
  SAEs"): loss ‖x − x̂‖² + λ Σ_i f_i ‖W_dec[i]‖, decoder rows free, b_dec not subtracted from the input.
- `ReLUUnit`: Bricken et al. 2023, "Towards monosemanticity": loss ‖x − x̂‖² + λ Σ_i f_i, decoder rows of unit norm
  (gradients along the rows removed), f = ReLU(W_enc (x − b_dec) + b_enc).
"""

from __future__ import annotations

from torch import Tensor

from sae.activation_functions import RELU
from sae.architectures.base import Hyper, Losses, Penalised, Weights, squared_error
from sae.sparse.activations import Acts


class ReLU(Penalised):
    name = "relu"
    nonlinearity = RELU
    unit_decoder = False
    subtract_b_dec = False
    decoder_norm = 0.1

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu_()
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        penalty = acts.over_all_features((acts.sum_tokens(f) * w["W_dec"].norm(dim=1)).sum())
        return Losses(squared_error(x, x_hat) + hyper.sparsity * penalty, x_hat, f)


class ReLUUnit(Penalised):
    name = "relu_unit"
    nonlinearity = RELU

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu_()
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        return Losses(squared_error(x, x_hat) + hyper.sparsity * acts.over_all_features(f.sum()), x_hat, f)
