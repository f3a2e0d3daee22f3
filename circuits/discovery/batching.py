"""How the prompts of a discovery are cut into batches, and batches into rounds, within a memory budget.

1. Prompts are sorted by length and cut into batches whose forward and backward pass stays within the budget.
2. Batches go in rounds: all gradients of a round first, then site by site the effects of all its batches, so that an
   autoencoder is read once a round where they are streamed (`sae.saes`). Without streaming a round is one batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from circuits.attribution.activations import Setting
from circuits.attribution.edges import check_edges
from circuits.attribution.node_effects import check_allowed
from circuits.discovery.resume import ResumeFolder
from circuits.metrics.metrics import Metric, get_metric
from circuits.metrics.probe import ReadModel, visible_sites
from circuits.options import DiscoverOptions
from circuits.prompts.dataset import PromptSet
from sae._run.processes import Processes, current
from sae.autoencoder import SparseAutoencoder
from sae.model.activation_checkpointing import Checkpointed
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites

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

    setting: Setting
    prompts: PromptSet
    options: DiscoverOptions
    files: ResumeFolder | None = None
    """Where finished batches go; None keeps them in memory alone."""
    progress: bool = True

    @staticmethod
    def of(
        model: LanguageModel,
        saes: Mapping[Site, SparseAutoencoder],
        prompts: PromptSet,
        options: DiscoverOptions,
        *,
        metric: str | Metric | None = None,
        progress: bool = True,
    ) -> DiscoveryRun:
        """A discovery over the sites of the options, all of them checked; metric: that of the options by default. Where
        the backward pass of one prompt takes more than the memory, it keeps the graph of one block at a time.
        """
        check_allowed(model, options.method)
        m = get_metric(options.metric if metric is None else metric)
        sites = visible_sites(m, model, select_sites(options.sites, list(saes)))
        setting = Setting.of(model, saes, m, sites=sites)
        if options.edge_nodes:
            check_edges(setting.saes)
        prompts = setting.prepare(prompts, differentiable=True)
        if not model.server and backward_bytes(setting.model, prompts.clean.n_positions) > options.memory * GIB:
            setting = replace(setting, model=Checkpointed.of(setting.model))
        return DiscoveryRun(setting, prompts, options, progress=progress)

    @property
    def sites(self) -> list[Site]:
        """The sites of the circuit, in forward order."""
        return list(self.setting.saes)

    @property
    def rows(self) -> int:
        """Prompts that go through the model at once."""
        return max_rows(self.setting.model, self.prompts.clean.n_positions, memory=self.options.memory)

    def batches(self) -> list[Tensor]:
        """The numbers of the prompts of each batch, short prompts first."""
        order = self.prompts.clean.lengths.argsort(stable=True).cpu()
        return list(order.split(max(1, min(self.rows, MOST_ROWS))))

    @property
    def processes(self) -> Processes:
        """The processes that share the batches, through the files; without files each process makes all of them."""
        return Processes() if self.files is None else current()

    def rounds(self, numbers: Sequence[int]) -> list[Sequence[int]]:
        """The batches that share one reading of the autoencoders: those whose clean and patch activations and gradients
        fit in the memory, and no more than leave some for every process; one where nothing is streamed.
        """
        step, n_positions = 1, self.prompts.clean.n_positions
        if self.setting.saes.is_lazy:
            n_prompts = min(self.rows, MOST_ROWS, len(self.prompts))
            reads = self.setting.saes.read_sites(self.sites)
            size = 3 * n_prompts * state_bytes(self.setting.model, {*reads, *reads.values()}, n_positions)
            step = min(int(self.options.memory * GIB / size), -(-len(numbers) // self.processes.size))
        step = max(1, step)
        return [numbers[start : start + step] for start in range(0, len(numbers), step)]


def max_rows(model: LanguageModel, n_positions: int, *, memory: float) -> int:
    """Prompts of `n_positions` tokens whose forward and backward pass stays within `memory` GiB (at least 1)."""
    return max(1, int(memory * GIB / backward_bytes(model, n_positions)))


def backward_bytes(model: LanguageModel, n_positions: int) -> int:
    """Bytes that a prompt keeps for its backward pass.

    Per token and layer: about 16 d of residual stream, norms, queries, keys and values, 3 d_ff of the MLP, and the
    attention probabilities, H S; all in the model's dtype; where it keeps one layer alone (`Checkpointed`) of that, and
    what stands at all sites, and its gradient. And the logits where they are read, their gradient, and what a metric
    makes of them, which outweigh all else in a small model of a large vocabulary.
    """
    config: Any = model.architecture.config
    width = model.d_model
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * width
    heads = getattr(config, "num_attention_heads", 1)
    per_token = (1 if model.checkpointed else model.n_layers) * (16 * width + 3 * inner + heads * n_positions)
    at_sites = 2 * state_bytes(model, model.sites, n_positions) if model.checkpointed else 0
    return per_token * n_positions * model.dtype.itemsize + at_sites + logit_bytes(model, n_positions)


def logit_bytes(model: LanguageModel, n_positions: int) -> int:
    """Bytes that the logits of a prompt take, in float32 and `LOGIT_COPIES` times: at the last position, or at all of
    them in a model that cannot leave the others out; nothing where a probe is read.
    """
    if isinstance(model, ReadModel):
        return 0
    last_only = "logits_to_keep" in inspect.signature(type(model.architecture).forward).parameters
    return LOGIT_COPIES * 4 * model.vocab_size * (1 if last_only else n_positions)


def state_bytes(model: LanguageModel, sites: Iterable[Site], n_positions: int) -> int:
    """One activation (or gradient) of a prompt at every site, and at every place that a transcoder reads."""
    return n_positions * sum(model.read_width(site) for site in sites) * model.dtype.itemsize


def lanes_rows(rows: int, n_positions: int, device: torch.device) -> int:
    """Prompts in the cut forward pass at once: the budget's, but on a CPU no more than fill its cores, since lanes that
    no node uses cost as much as those in use.
    """
    return min(rows, max(1, LANE_TOKENS // n_positions)) if device.type == "cpu" else rows
