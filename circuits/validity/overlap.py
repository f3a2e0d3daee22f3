"""Overlap of circuits found on samples of the prompts, from effects that are stored: no model is run.

Legend: B prompts, G groups, R resamples, n nodes, k nodes of a circuit.

1. Prompts are drawn anew with replacement, by template where they share templates (`circuits.uncertainty.bootstrap`).
2. The circuit of a resample is the k nodes of largest |mean effect| on the prompts drawn.
3. Two circuits overlap by the Jaccard index, |A and B| / |A or B|. Its mean over pairs of resamples says how much of a
   circuit is due to the prompts that happened to be drawn; Méloux et al. 2025 (arXiv 2510.00845) measure .67 for the
   circuit of indirect objects in GPT-2 and suggest .8 as the bar.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.uncertainty.bootstrap import MIN_GROUPS, Bootstrap, group_sums

Interval = tuple[float, float]


@dataclass(frozen=True)
class NodeValues:
    """Effects of nodes on every prompt."""

    names: list[str]
    """[n] names of the nodes."""
    values: Tensor
    """[B, n]."""
    groups: Tensor
    """[B] what each prompt is drawn with."""

    def strongest(self, k: int, rows: Tensor | None = None) -> Tensor:
        """[n] bool: the k nodes of largest |mean effect| on the prompts `rows`, all by default; fewer where fewer have
        one.
        """
        return _largest(self.values if rows is None else self.values[rows], k)

    def resampled(self, k: int, bootstrap: Bootstrap) -> Tensor:
        """[R, n] bool: the k strongest nodes of every resample."""
        sums = group_sums(self.values, self.groups)  # [G, n]
        counts = bootstrap.counts(len(sums)).to(sums)
        return torch.cat([_largest_rows(chunk @ sums, k) for chunk in counts.split(100)])


def _largest(values: Tensor, k: int) -> Tensor:
    return _largest_rows(values.sum(0, keepdim=True), k)[0]


def _largest_rows(sums: Tensor, k: int) -> Tensor:
    """[R, n] bool: in every row the k of largest magnitude that are not zero."""
    size = sums.abs()
    top = size.topk(min(k, sums.shape[1]), dim=1).indices
    return torch.zeros_like(sums, dtype=torch.bool).scatter_(1, top, True) & (size > 0)


def jaccard(a: Tensor, b: Tensor) -> Tensor:
    """|a and b| / |a or b| of sets [..., n] bool; 1 for two empty sets."""
    union = (a | b).sum(-1)
    return torch.where(union > 0, (a & b).sum(-1) / union.clamp(min=1), 1.0)


@dataclass(frozen=True)
class Overlap:
    """How much circuits overlap."""

    value: float
    """The Jaccard index, or its mean over pairs of resamples."""
    interval: Interval | None
    """Between which 95 % of the resamples are; None for too few groups of prompts."""
    core: int = 0
    """Nodes that are in 95 % of the resamples."""


def resample_overlap(nodes: NodeValues, k: int, bootstrap: Bootstrap) -> Overlap:
    """Overlap of the circuits of k nodes of pairs of resamples. Each resample is paired with the next one."""
    if len(nodes.groups.unique()) < MIN_GROUPS:
        return Overlap(float("nan"), None)
    sets = nodes.resampled(k, bootstrap)
    pairs = jaccard(sets, sets.roll(1, dims=0))
    core = int((sets.float().mean(0) >= bootstrap.level).sum())
    return Overlap(float(pairs.mean()), _spread(pairs, bootstrap), core)


def overlap_between(a: NodeValues, b: NodeValues, k: int, bootstrap: Bootstrap) -> Overlap:
    """Overlap of the circuits of k nodes of two analyses whose nodes are the same where they have the same name. Where
    both are of the same prompts, the same ones are drawn for both.
    """
    shared = list(dict.fromkeys([*a.names, *b.names]))
    column = {name: number for number, name in enumerate(shared)}

    def placed(sets: Tensor, names: Sequence[str]) -> Tensor:
        wide = torch.zeros(*sets.shape[:-1], len(shared), dtype=torch.bool)
        wide[..., [column[name] for name in names]] = sets
        return wide

    value = float(jaccard(placed(a.strongest(k), a.names), placed(b.strongest(k), b.names)))
    if min(len(a.groups.unique()), len(b.groups.unique())) < MIN_GROUPS:
        return Overlap(value, None)
    drawn = (placed(of.resampled(k, bootstrap), of.names) for of in (a, b))
    return Overlap(value, _spread(jaccard(*drawn), bootstrap))


def _spread(values: Tensor, bootstrap: Bootstrap) -> Interval:
    tail = (1 - bootstrap.level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high
