"""TopK: the k largest pre-activations of each token are active.

Gao et al. 2024, "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), equation 2:
z = TopK(W_enc (x − b_pre) + b_enc), x̂ = W_dec z + b_pre, loss ‖x − x̂‖²; AuxK (section 2.4) comes from the base class.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.activation_functions import TOPK
from sae.architectures.base import Architecture, Hyper, Losses, Weights, squared_error
from sae.sparse.activations import Acts, SparseActs
from sae.sparse.encoder_pass import EncoderPass, top_k


class TopK(Architecture):
    name = "topk"
    nonlinearity = TOPK

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        chunks = [top_k(z, hyper.k) for z in encoder.chunks()]
        value, feature = (torch.cat(column) for column in zip(*chunks, strict=True))  # [N, k]
        return SparseActs.fixed_k(feature, value, len(encoder.W_enc))

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        f = z.relu()
        x_hat = acts.decode(f, w["W_dec"]) + w["b_dec"]
        return Losses(squared_error(x, x_hat), x_hat, f)
