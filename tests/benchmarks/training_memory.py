"""How much memory training takes: a formula, which `bench_sae_step` holds against the process.

With P = 2 F d + d + F (1 + s) parameters of an autoencoder (s: its architecture's own numbers a feature), in float32:

1. weights 4 P, gradients 4 P, Adam's two moments 8 P: once for every autoencoder that is trained;
2. intermediates: once for all of them, since they take their steps one after another
   - the pre-activations of a sparse step, one [rows, F]; with autocast one of half the size, and W_enc at that size, as
     far as they exceed the gradients, before which they are gone. Of a dense step `DENSE_TENSORS` smaller ones, and two
     gradients of a weight matrix before they are added;
   - F d numbers where decoder rows are held at unit norm: their products with the gradient's rows;
   - group maxima and candidates of the selection: N F / 8 and 24 N k numbers;
   - entries: 20 numbers for each of the N k active ones, and as many for each AuxK one;
   - `AUX_TOKENS` · F numbers for the pre-activations of dead features, and another F d: AuxK's own gradient
     of a weight matrix before it is added;
   - about eight [N, d] tensors: inputs, reconstruction, error and their gradients; three more for each level of a
     nested reconstruction.

N tokens a batch, d width, F features, k active ones a token. The buffer of activations and the model come on top.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae.architectures import architecture
from sae.architectures.base import DENSE_CHUNK_BYTES
from sae.sparse.encoder_pass import AUX_TOKENS, row_chunks
from sae.training.config import TrainConfig

N_LEVELS = {"multi_topk": 2, "matryoshka": 5}
"""Reconstructions that a loss compares with the input, where there is more than one."""
WIDEST = {"multi_topk": 4}
"""Entries a token that a loss uses, as a multiple of k, where it is not k."""
DENSE_TENSORS = {"relu": 4, "relu_unit": 4, "p_anneal": 6, "jumprelu": 7, "gated": 8}
"""[rows, F] tensors that a dense step has at a time."""


class TrainingMemory(NamedTuple):
    """Bytes that training takes."""

    weights: int
    """Of one autoencoder."""
    gradients: int
    """Of one autoencoder."""
    moments: int
    """Adam's, of one autoencoder."""
    intermediates: int
    """Of a step; shared by all autoencoders."""

    @property
    def each(self) -> int:
        """What every further autoencoder adds."""
        return self.weights + self.gradients + self.moments

    def total(self, n_autoencoders: int = 1) -> int:
        """What training that many at the same time takes."""
        return n_autoencoders * self.each + self.intermediates


def training_memory(
    config: TrainConfig, width: int, device: torch.device, *, dense: bool = True, aux: bool = False
) -> TrainingMemory:
    """The formula above.

    `dense`: while a large part of all features may be active; `aux`: while there are dead features for the AuxK loss.
    """
    kind, name = architecture(config.architecture), config.architecture
    n_tokens, features, k = config.batch, config.features if kind.trained else width, config.k * WIDEST.get(name, 1)
    extra = sum(tensor[:1].numel() for tensor in kind.extra_weights(features).values())
    parameters = 2 * features * width + width + features * (1 + extra)
    dense = dense and not kind.fixed_k
    chunk = next(row_chunks(n_tokens, features, device, cpu_bytes=DENSE_CHUNK_BYTES if dense else None))
    numbers = (chunk.stop - chunk.start) * features
    if dense:
        numbers = DENSE_TENSORS[name] * numbers + 2 * features * width
    elif config.autocast and device.type == "cuda":
        numbers = max(0, (numbers + n_tokens * features // 8 + features * width) // 2 - parameters)
    else:
        numbers += n_tokens * features // 8
    numbers += 44 * n_tokens * k + (8 + 3 * (N_LEVELS.get(name, 1) - 1)) * n_tokens * width
    if kind.unit_decoder:
        numbers += features * width
    if aux:
        n_aux = min(AUX_TOKENS, n_tokens)
        numbers += n_aux * features + 20 * n_aux * config.k_aux + features * width
    return TrainingMemory(4 * parameters, 4 * parameters, 8 * parameters, 4 * numbers)
