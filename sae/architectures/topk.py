"""TopK: the k largest pre-activations of each token are active.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093):

- `TopK`, equation 2: z = TopK(W_enc (x − b_pre) + b_enc), x̂ = W_dec z + b_pre, loss ‖x − x̂‖²; AuxK (section 2.4)
  comes from the base class.
- `MultiTopK`, appendix A.3: the loss also reconstructs with 4k features, so that codes of other sizes stay meaningful,
  L(k) + L(4k) / 8 with L(n) the squared error of the n largest.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.activation_functions import TOPK
from sae.architectures.base import Architecture, Hyper, Losses, Weights, squared_error
from sae.sparse.activations import Acts, SparseActs
from sae.sparse.encoder_pass import EncoderPass, top_k

WIDER = 4
WIDER_WEIGHT = 1 / 8


class TopK(Architecture):
    name = "topk"
    nonlinearity = TOPK

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        return encoder.entries([encoder.largest(z, hyper.k) for z in encoder.chunks()])

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        return Losses(squared_error(x, x_hat), x_hat, f)


class MultiTopK(Architecture):
    name = "multi_topk"
    nonlinearity = TOPK

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        n_features = len(encoder.W_enc)
        wide = min(WIDER * hyper.k, n_features)
        chunks = [top_k(z, wide) for z in encoder.chunks()]
        value, feature = (torch.cat(column) for column in zip(*chunks, strict=True))  # [N, 4k]
        value, order = value.sort(dim=-1, descending=True)
        feature = feature.gather(-1, order)
        level = (torch.arange(wide, device=value.device) >= hyper.k).long().expand_as(feature)
        return SparseActs.fixed_k(feature, value, n_features).at_levels(level.flatten(), n_levels=2)

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        assert isinstance(acts, SparseActs) and acts.level is not None
        f = z.relu()
        x_hat, x_hat_wide = acts.decode(f, w["W_dec"]).cumsum(0) + w["b_dec"]
        loss = squared_error(x, x_hat) + WIDER_WEIGHT * squared_error(x, x_hat_wide)
        return Losses(loss, x_hat, f * (acts.level == 0))
