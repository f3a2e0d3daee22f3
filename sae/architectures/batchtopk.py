"""BatchTopK: the k·N largest positive pre-activations of a batch of N tokens are active; a token may use more or fewer.

Bussmann et al. 2024, "BatchTopK sparse autoencoders" (arXiv 2412.06410), section 3; the loss is TopK's. At inference
the batch is replaced by a threshold: the mean, here a running one, of the smallest activation of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sae.activation_functions import JUMPRELU
from sae.architectures.base import Hyper, Weights
from sae.architectures.topk import TopK
from sae.sparse.activations import SparseActs
from sae.sparse.encoder_pass import EncoderPass, batch_top_k

MEMORY = 0.99
"""Decay of the running threshold a step."""


class BatchTopK(TopK):
    name = "batchtopk"
    nonlinearity = JUMPRELU

    def extra_state(self) -> dict[str, Tensor]:
        return {"threshold": torch.tensor(0.0), "n_thresholds": torch.tensor(0.0)}

    def select(self, encoder: EncoderPass, w: Weights, hyper: Hyper) -> SparseActs:
        return batch_top_k(encoder.chunks, hyper.k)

    def observe(self, f: Tensor, state: Mapping[str, Tensor]) -> None:
        if f.numel():
            state["n_thresholds"].add_(1)
            memory = (1 - 1 / state["n_thresholds"]).clamp(max=MEMORY)  # a plain mean at first
            state["threshold"].mul_(memory).add_((1 - memory) * f.min())

    def export(self, w: Weights, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return super().export(w, state) | {"threshold": state["threshold"].expand_as(w["b_enc"]).clone()}
