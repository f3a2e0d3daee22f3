"""Identity: the neurons as a dictionary, the baseline every learnt dictionary is compared with.

f = x, x̂ = f: nothing is trained, reconstruction is exact, and L0 is the width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.activation_functions import IDENTITY
from sae.architectures.base import Architecture, Hyper, Losses, Weights, squared_error
from sae.sparse.activations import Acts, SparseActs
from sae.sparse.encoder_pass import EncoderPass


class Identity(Architecture):
    name = "identity"
    nonlinearity = IDENTITY
    trained = False

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        z = torch.cat([z.clone() for z in encoder.chunks()])  # each chunk is written over by the next
        every = torch.arange(z.shape[1], device=z.device).expand_as(z)
        return SparseActs.fixed_k(every, z, z.shape[1])

    def loss(self, z: Tensor, acts: Acts, x: Tensor, w: Weights, hyper: Hyper) -> Losses:
        x_hat = acts.decode(z, w["W_dec"]) + w["b_dec"]
        return Losses(squared_error(x, x_hat), x_hat, z)
