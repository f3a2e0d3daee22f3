"""Groups of a list of entries: how large they are, where they begin, sums over them; on every device.

On MPS torch has no `segment_reduce`, no `embedding_bag` before release 2.10, and its `bincount` takes seconds where
indices repeat. There rows are gathered and added by index instead, some of them at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

GATHER_BYTES = 256 * 2**20
"""Largest block of gathered rows."""


def group_sizes(index: Tensor, n: int) -> Tensor:
    """How often each of 0, ..., n - 1 is in an index: [n] int64."""
    if index.device.type == "mps":
        once = torch.ones(len(index), device=index.device)
        return torch.zeros(n, device=index.device).index_add_(0, index, once).long()
    return torch.bincount(index, minlength=n)


def group_offsets(index: Tensor, n: int, order: Tensor | None = None) -> Tensor:
    """Where each of the n groups of an index begins, once sorted by `order` if it is not yet, and the end: [n + 1].

    The host of a GPU does not wait for it.
    """
    if index.device.type not in ("cpu", "mps"):  # bincount would ask for the largest value
        index = index if order is None else index[order]
        return torch.searchsorted(index, torch.arange(n + 1, device=index.device, dtype=index.dtype))
    offsets = torch.zeros(n + 1, dtype=torch.int64, device=index.device)
    torch.cumsum(group_sizes(index, n), 0, out=offsets[1:])
    return offsets


def group_sums(value: Tensor, index: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Σ of the values of each group: [n]; `order` sorts the index, `offsets` are its groups'."""
    if value.device.type == "mps":
        return value.new_zeros(len(offsets) - 1).index_add_(0, index, value)
    return torch.segment_reduce(value[order], "sum", offsets=offsets, initial=0)


def rows_added(source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Σ_{j in offsets[b]:offsets[b+1]} weight[j] · source[index[j]], [bags, d], by index; no gradient."""
    bag = torch.repeat_interleave(offsets.diff())  # [n]
    out = source.new_zeros(len(offsets) - 1, source.shape[1])
    for part in _blocks(index, source):
        out.index_add_(0, bag[part], source[index[part]] * weight[part, None])
    return out


def rows_multiplied(g: Tensor, bag: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """g[bag[j]] · rows[index[j]] for every entry, [n], by index."""
    parts = [(g[bag[part]] * rows[index[part]]).sum(1) for part in _blocks(index, rows)]
    return torch.cat(parts) if parts else g.new_zeros(0)


def _blocks(index: Tensor, source: Tensor) -> list[slice]:
    """Slices of the entries whose gathered rows fit `GATHER_BYTES`."""
    size = max(1, GATHER_BYTES // (source.shape[1] * source.element_size()))
    return [slice(start, start + size) for start in range(0, len(index), size)]
