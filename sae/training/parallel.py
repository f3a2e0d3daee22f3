"""Training by several processes: what each of them trains, and what is not possible.

- sites: each process trains its share of the sites, on activations of forward passes that all of them make
  (`sae.data.shared_activations`). The bits are those of one process.
- data: each process has all autoencoders, and makes the gradients of its share of every batch; their mean moves the
  weights, which stay the same in all of them. Batches, and the tokens for AuxK, are those of one process, so that
  results agree but for the order of sums.
- features: each process has an equal block of the features of all autoencoders, for widths that fit no device, and all
  tokens (`sae.sparse.shards`). Results agree but for the order of sums.

N tokens, F features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from sae._run.processes import Processes
from sae.architectures.base import BatchShare
from sae.data.shared_activations import SharedActivations
from sae.errors import UserError
from sae.model.sites import Site
from sae.sparse.encoder_pass import AUX_TOKENS
from sae.sparse.shards import FeatureShards
from sae.training.checkpoint import Checkpoint
from sae.training.config import TrainConfig
from sae.training.trainer import Trainer, order_of_rows
from sae.training.training_sae import TrainingSAE

Parallel = Literal["sites", "data", "features"]
"""What several processes share out."""
OVER_FEATURES = ("topk", "relu", "relu_unit", "jumprelu")
"""Architectures whose loss is of sums over features, which processes can add up."""
OVER_BATCHES = ("batchtopk", "matryoshka")
"""Architectures that choose their active features over a whole batch."""


def share_sites(sites: Sequence[Site], n: int) -> list[Sequence[Site]]:
    """The sites of each of n processes: neighbours, about as many for all."""
    ends = [len(sites) * rank // n for rank in range(n + 1)]
    return [sites[start:end] for start, end in pairwise(ends)]


def choose_parallel(
    wanted: Parallel | None, sites: Sequence[Site], config: TrainConfig, processes: Processes, *, cached: bool
) -> Parallel:
    """Choose what processes share out: sites by default where there is one for each. UserError for what is not
    possible.
    """
    n = processes.size
    parallel = wanted or ("sites" if len(sites) >= n else "data")
    if n == 1:
        return "sites"
    if parallel == "sites":
        if len(sites) < n:
            raise UserError(f"parallel is 'sites', of which there are {len(sites)} for {n} processes: start fewer")
        return parallel
    if parallel == "features":
        if reason := _features_stay_together(config, n, cached=cached):
            raise UserError(f"{n} processes cannot share the features: {reason}")
        return parallel
    reason = None
    if cached:
        reason = "activations are read from a cache, which only sites can be read from apart"
    elif config.architecture in OVER_BATCHES:
        reason = f"architecture is {config.architecture!r}, which chooses its features over the whole batch"
    elif config.revival == "resample":
        reason = "revival is 'resample', which draws from the errors of the whole batch"
    elif config.architecture == "p_anneal" and config.sparsity is not None:
        reason = "a fixed weight of p_anneal is rescaled on tokens of the whole batch"
    elif config.architecture == "identity":
        reason = "architecture is 'identity', of which nothing is trained"
    elif config.batch < n:
        reason = f"a batch has {config.batch} tokens"
    if reason is not None:
        raise UserError(
            f"{n} processes cannot share the data: {reason}; start at most {len(sites)}, with a site or more for each"
        )
    return parallel


def _features_stay_together(config: TrainConfig, n: int, *, cached: bool) -> str | None:
    """Why n processes cannot share the features of an autoencoder; None where they can."""
    if cached:
        return "activations are read from a cache, which only sites can be read from apart"
    if config.architecture not in OVER_FEATURES:
        return f"architecture is {config.architecture!r}, and only {', '.join(OVER_FEATURES)} are added up over blocks"
    if config.revival == "resample":
        return "revival is 'resample', which draws from the errors of the whole autoencoder: take auxk"
    if config.skip:
        return "a skip connection belongs to no feature: leave --skip out"
    if config.features % n:
        return f"features is {config.features}, which does not divide into {n} equal blocks"
    return None


class DataTrainer(Trainer):
    """One of several processes that train the same autoencoders, each on its share of every batch."""

    activations: SharedActivations

    @property
    def savers(self) -> Processes:
        """The first process alone has all there is."""
        return Processes()

    def _save(self) -> None:
        self.processes.by_first(super()._save)

    def _prepare(self) -> None:
        """Centre and scale of each site by one process, from all its rows; then rows for all sites."""
        self.activations.by_site()
        super()._fill()
        mine = share_sites([sae.site for sae in self.saes], self.processes.size)[self.processes.rank]
        for sae in self.saes:
            is_mine = sae.site in mine
            if is_mine:
                sae.prepare(self.buffer[sae.site][: self.filled], self.buffer[sae.read_site][: self.filled])
            for key in sorted({"centre", "scale", "read_centre", "read_scale"} & sae.state.keys()):
                self.processes.sum_(sae.state[key].mul_(is_mine))
        self._fill()

    def _fill(self) -> None:
        self.activations.by_row(self._receivers)
        super()._fill()

    def _receivers(self, n: int) -> Tensor:
        """The process [n] in whose share of a step each row of a fill is; -1 for rows that no step takes."""
        receivers = torch.full((n,), -1)
        (order,) = (order_of_rows(seed, self.fill, n) for seed in {sae.config.seed for sae in self.saes})
        for start in range(0, max(1, n - self.batch + 1), self.batch):
            for rank, rows in enumerate(self._shares(order[start : start + self.batch])):
                receivers[rows] = rank
        return receivers

    def _shares(self, rows: Tensor) -> Sequence[Tensor]:
        """The rows of a batch for each process, in turns: each gets as many of the first, which AuxK reads."""
        return [rows[rank :: self.processes.size] for rank in range(self.processes.size)]

    def _next_rows(self) -> dict[int, Tensor]:
        ((seed, rows),) = super()._next_rows().items()
        mine = self._shares(rows)[self.processes.rank]
        n_aux = len(self._shares(torch.empty(AUX_TOKENS))[self.processes.rank])
        for sae in self.saes:
            sae.share = BatchShare(len(mine) / len(rows), n_aux, self._sums)
        return {seed: mine}

    def _make_gradients(self) -> None:
        """The gradients of the mean over the whole batch: those of the shares, weighted by their tokens, added up."""
        super()._make_gradients()
        for sae in self.saes:
            weights = list(sae.weights.values())
            here = [float(weight.grad is not None) for weight in weights]
            anywhere = self.processes.sum_(torch.tensor(here, device=self.device)).tolist()
            moved = [weight for weight, n in zip(weights, anywhere, strict=True) if n]
            gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in moved]
            totals = self._sums([sae.share.weight * gradient for gradient in gradients])
            for weight, total in zip(moved, totals, strict=True):
                weight.grad = total

    def _sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of tensors over all processes, by one message."""
        flat = self.processes.sum_(torch.cat([tensor.flatten().float() for tensor in tensors]))
        blocks = flat.split([tensor.numel() for tensor in tensors])
        return [block.view_as(tensor) for block, tensor in zip(blocks, tensors, strict=True)]


# ---- features

REPLICATED = ("b_dec",)
"""Weights that every process has whole."""


class FeatureTrainer(Trainer):
    """One of several processes that train the same autoencoders on the same tokens, each a block of their features."""

    def _prepare(self) -> None:
        super()._prepare()
        for sae in self.saes:  # of the same rows, but perhaps on machines that add them up in another order
            for key in sorted({"centre", "scale", "read_centre", "read_scale"} & sae.state.keys()):
                self.processes.sum_(sae.state[key].mul_(self.processes.is_first))

    def _make_gradients(self) -> None:
        """Each has the gradients of its features; that of b_dec is a sum over all features."""
        super()._make_gradients()
        for sae in self.saes:
            bias = sae.weights["b_dec"]
            bias.grad = self.processes.sum_(torch.zeros_like(bias) if bias.grad is None else bias.grad)

    def _to_save(self) -> Mapping[str, Tensor]:
        """The block of rows that this process has; the first also writes what all of them have."""
        tensors = self._tensors()
        return {name: x for name, x in tensors.items() if self.processes.is_first or _by_feature(name, x)}

    def _of_this_process(self, saved: Checkpoint) -> Checkpoint:
        shards = FeatureShards(self.processes)
        mine = {name: shards.mine(x).clone() if _by_feature(name, x) else x for name, x in saved.tensors.items()}
        return replace(saved, tensors=mine)

    def to_save(self, sae: TrainingSAE) -> TrainingSAE | None:
        """An autoencoder with all of its features, on the CPU of the first process; None in the others."""
        blocks = {key: self.processes.to_first(x.detach().cpu()) for key, x in sae.weights.items()}
        if not self.processes.is_first:
            return None
        joined = TrainingSAE(
            sae.name, sae.site, sae.width, sae.config, torch.device("cpu"), read_width=sae.read_width
        )  # fmt: skip
        joined.weights = {key: rows[0] if key in REPLICATED else torch.cat(rows) for key, rows in blocks.items()}
        joined.state = {key: x.cpu() for key, x in sae.state.items()}
        return joined


def _by_feature(name: str, x: Tensor) -> bool:
    """Whether a tensor of a checkpoint has a row for each feature, by its name there (`checkpoint.tensors_of`)."""
    _, kind, key = name.split("/")[:3]
    return key == "silent" if kind == "state" else x.ndim > 0 and key not in REPLICATED
