"""How much memory training takes: a formula, which `tests/benchmarks/bench_sae_step.py` holds against the process.

With P = 2 F d + d + F (1 + s) parameters of an autoencoder (s: its architecture's own numbers a feature), in float32:

1. weights 4 P, gradients 4 P, Adam's two moments 8 P: once for every autoencoder that is trained;
2. intermediates: once for all of them, since they take their steps one after another
   - one to three [rows, F] buffers (`Architecture.n_buffers`, `sae.sparse.workspace.Workspace`); in a sparse step with
     autocast one of half the size, and W_enc at that size, as far as they exceed the gradients, before which they are
     gone;
   - F d numbers where decoder rows are held at unit norm: their products with the gradient's rows;
   - group maxima and candidates of the selection: N F / 8 and 24 N k numbers;
   - entries: 20 numbers for each of the N k active ones, and as many for each AuxK one;
   - `AUX_TOKENS` · F numbers for the pre-activations of dead features, and another F d: AuxK's own gradient
     of a weight matrix before it is added;
   - about eight [N, d] tensors: inputs, reconstruction, error and their gradients; three more for each level of a
     nested reconstruction.

`keep_freed_memory` makes the C library hand blocks of gradients out again instead of returning them to the system after
every step, which costs a twentieth of a TopK step.

N tokens a batch, d width, F features, k active ones a token. The buffer of activations and the model come on top.
"""

from __future__ import annotations

import ctypes
import sys
from typing import NamedTuple

import torch

from sae.architectures import architecture
from sae.architectures.base import AUX_TOKENS
from sae.sparse.workspace import chunk_rows
from sae.training.config import TrainConfig

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's mallopt options."""


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
    recipe = architecture(config.architecture)
    n_tokens, features, k = config.batch, config.features if recipe.trained else width, config.k * recipe.widest
    own = sum(tensor[:1].numel() for tensor in recipe.own_weights(features).values())
    parameters = 2 * features * width + width + features * (1 + own)
    rows = chunk_rows(n_tokens, features, device)
    numbers = (recipe.n_buffers if dense else 1) * rows * features + n_tokens * features // 8
    if config.autocast and device.type == "cuda" and not (dense and recipe.may_be_dense):
        numbers = max(0, (numbers + features * width) // 2 - parameters)
    numbers += 44 * n_tokens * k + (8 + 3 * (recipe.n_levels - 1)) * n_tokens * width
    if recipe.unit_decoder:
        numbers += features * width
    if aux:
        n_aux = min(AUX_TOKENS, n_tokens)
        numbers += n_aux * features + 20 * n_aux * config.k_aux + features * width
    return TrainingMemory(4 * parameters, 4 * parameters, 8 * parameters, 4 * numbers)


def keep_freed_memory() -> None:
    """Blocks up to 256 MB come from the heap, and up to 1 GB of its free end stays; for this process, glibc only."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        mallopt = ctypes.CDLL(None).mallopt
        _ = mallopt(M_MMAP_THRESHOLD, 2**28) or mallopt(
            M_MMAP_THRESHOLD, 2**25
        )  # older versions refuse more than 32 MB
        mallopt(M_TRIM_THRESHOLD, 2**30)
