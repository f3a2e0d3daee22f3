"""How the prompts of a discovery are cut into batches, and batches into rounds, within a memory budget.

1. Prompts are sorted by length and cut into batches whose forward and backward pass stays within the budget.
2. Batches go in rounds: all gradients of a round first, then site by site the effects of all its batches, so that an
   autoencoder is read once a round where they are streamed (`sae.saes`). Without streaming a round is one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.discovery.resume import ResumeFolder
from circuits.metrics.metrics import Metric
from circuits.metrics.probe import ReadModel
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes

GIB = 2**30
LOGIT_COPIES = 4
"""Logits, their gradient, and two tensors of their size that a metric makes of them."""
MOST_ROWS = 64
"""Prompts of a batch at most."""
LANE_TOKENS = 256
"""Tokens that fill a CPU's cores: lanes beyond them cost as much unused as in use."""


@dataclass(frozen=True)
class DiscoveryRun:
    """A discovery: what both passes compute with."""

    model: LanguageModel
    saes: Mapping[Site, SparseAutoencoder]
    prompts: PromptSet
    metric: Metric
    options: DiscoverOptions
    sites: Sequence[Site]
    files: ResumeFolder | None = None
    """Where finished batches go; None keeps them in memory alone."""
    progress: bool = True

    @property
    def rows(self) -> int:
        """Prompts that go through the model at once."""
        return max_rows(self.model, self.prompts.clean.n_positions, memory=self.options.memory)

    def batches(self) -> list[Tensor]:
        """The numbers of the prompts of each batch, short prompts first."""
        order = self.prompts.clean.lengths.argsort(stable=True).cpu()
        return list(order.split(max(1, min(self.rows, MOST_ROWS))))

    def rounds(self, numbers: Sequence[int]) -> Iterator[Sequence[int]]:
        """The batches that share one reading of the autoencoders."""
        step = batches_per_round(self.model, self.saes, self.prompts, self.sites, self.rows, memory=self.options.memory)
        for start in range(0, len(numbers), step):
            yield numbers[start : start + step]


def max_rows(model: LanguageModel, n_positions: int, *, memory: float) -> int:
    """Prompts of `n_positions` tokens whose forward and backward pass stays within `memory` GiB (at least 1)."""
    return max(1, int(memory * GIB / backward_bytes(model, n_positions)))


def backward_bytes(model: LanguageModel, n_positions: int) -> int:
    """Bytes that a prompt keeps for its backward pass.

    Per token and layer: about 16 d of residual stream, norms, queries, keys and values, 3 d_ff of the MLP, and the
    attention probabilities, H S; all in the model's dtype. And the logits where they are read, their gradient, and what
    a metric makes of them, which outweigh all else in a small model of a large vocabulary.
    """
    config = model.hf.config
    width = model.d_model
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    heads = getattr(config, "num_attention_heads", 1)
    per_token = model.n_layers * (16 * width + 3 * inner + heads * n_positions)
    return per_token * n_positions * model.dtype.itemsize + logit_bytes(model, n_positions)


def logit_bytes(model: LanguageModel, n_positions: int) -> int:
    """Bytes that the logits of a prompt take, in float32 and `LOGIT_COPIES` times: at the last position, or at all of
    them in a model that cannot leave the others out; nothing where a probe is read.
    """
    if isinstance(model, ReadModel):
        return 0
    last_only = "logits_to_keep" in inspect.signature(type(model.hf).forward).parameters
    return LOGIT_COPIES * 4 * model.vocab_size * (1 if last_only else n_positions)


def state_bytes(model: LanguageModel, sites: Sequence[Site], n_positions: int) -> int:
    """One activation (or gradient) of a prompt at every site."""
    return n_positions * sum(model.widths[site] for site in sites) * model.dtype.itemsize


def batches_per_round(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    sites: Sequence[Site],
    rows: int,
    *,
    memory: float,
) -> int:
    """Batches whose clean and patch activations and gradients fit in `memory` GiB; one where nothing is streamed."""
    if not as_saes(saes).is_lazy:
        return 1
    size = 3 * min(rows, MOST_ROWS, len(prompts)) * state_bytes(model, sites, prompts.clean.n_positions)
    return max(1, int(memory * GIB / size))


def lanes_rows(rows: int, n_positions: int, device: torch.device) -> int:
    """Prompts in the cut forward pass at once: the budget's, but on a CPU no more than fill its cores, since lanes that
    no node uses cost as much as those in use.
    """
    return min(rows, max(1, LANE_TOKENS // n_positions)) if device.type == "cpu" else rows
