"""Sums over segments of a list of entries, and operations on rows, in torch or by Triton kernels.

A segment is what one token, or one feature, has of the entries (token, feature) of a batch.

1. `weighted_segment_sum`: out[b] = Σ_{j in b} weight[j] · source[index[j]], and `segment_dot`, the gradient of its
   weights;
2. `remove_parallel_` and `normalize_rows_`: gradients without their part along the rows they are for, and unit rows;
3. `group_sizes`, `group_offsets`, `group_sums`: how large segments are, where they begin, sums of numbers over them.

Plain torch does all of it by default. 1 and 2 have Triton kernels too (`sae.sparse.triton_kernels`), which are tested
but were not timed on a GPU yet; the environment variable `SFC_KERNELS` turns them on. `auto` takes them on CUDA, where
Triton can be imported and both agree on a small example; if they do not, or do not compile, a warning says so and torch
takes their place. `triton` always takes them, on any device (with TRITON_INTERPRET=1 also on a CPU, slowly, which is
how they are tested). Kernels add up in float32 whatever rows are stored in; results have the dtype of the rows.
Autocast changes nothing.

On MPS torch has no `segment_reduce`, no `embedding_bag` before release 2.10, and its `bincount` takes seconds where
indices repeat. There rows are gathered and added by index instead, some of them at a time.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.errors import UserError

log = logging.getLogger(__name__)

MODES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Number types that rows of the kernels may have."""
SMALLEST_NORM = 1e-12
GATHER_BYTES = 256 * 2**20
"""Largest block of gathered rows."""
_mode = [os.environ.get("SFC_KERNELS", "torch")]


@contextmanager
def using(mode: str) -> Iterator[None]:
    """Within it, `mode` holds in place of the environment variable."""
    _mode.append(mode)
    try:
        yield
    finally:
        _mode.pop()


def kernels_for(*tensors: Tensor) -> ModuleType | None:
    """`sae.sparse.triton_kernels` where they are turned on for these tensors, all of one device; None for torch."""
    mode, device = _mode[-1], tensors[0].device
    if mode not in MODES:
        raise UserError(f"SFC_KERNELS is {mode!r}, allowed are {', '.join(MODES)}")
    if mode == "torch" or (mode == "auto" and device.type != "cuda"):
        return None
    if any(tensor.dtype not in DTYPES for tensor in tensors):
        return None
    return _tried(device) if mode == "auto" else _imported(device)


def _imported(device: torch.device) -> ModuleType:
    if device.type in ("cpu", "mps") and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError(
            f"SFC_KERNELS is 'triton', but Triton has no code for {device.type!r}: leave the variable out, or set "
            "TRITON_INTERPRET=1 to have the kernels interpreted"
        )
    try:
        return import_module("sae.sparse.triton_kernels")
    except ImportError as error:
        raise UserError(
            f"SFC_KERNELS is 'triton', but Triton cannot be imported ({error}): install it, or leave the variable out"
        ) from error


@cache
def _tried(device: torch.device) -> ModuleType | None:
    """The kernels, if they can be had on a device and do there what torch does."""
    if not torch.cuda.is_available():
        return None
    try:
        kernels = import_module("sae.sparse.triton_kernels")
    except ImportError:
        return None
    try:
        check(kernels, device)
    except Exception as error:  # whatever a compiler or a driver may raise
        log.warning("Triton's kernels do not work on %s, torch takes their place: %s", device, error)
        return None
    return kernels


@torch.no_grad()
def check(kernels: ModuleType, device: torch.device | str) -> None:
    """Raises an AssertionError where the kernels do not agree with torch on a few bags, empty, short and long."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    lengths = torch.tensor([0, 3, 1, 2 * kernels.WINDOW + 5, 40, kernels.WINDOW + 1, 0])
    bag = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device)
    index = torch.randint(50, (len(bag),), generator=generator).to(device)
    source, rows, weight = normal(50, 96), normal(len(lengths), 96), normal(len(bag))
    out, dots = kernels.bag_sum_and_dots(source, index, offsets, weight, rows)
    unit, projected = rows.clone(), out.clone()
    kernels.normalize_rows_(unit, SMALLEST_NORM)
    kernels.remove_parallel_(projected, unit)
    with using("torch"):
        twin, twin_out = rows.clone(), weighted_segment_sum(source, index, offsets, weight)
        normalize_rows_(twin)
        twin_projected = twin_out.clone()
        remove_parallel_(twin_projected, twin)
    expected = (twin_out, (source[index] * rows[bag]).sum(1), twin, twin_projected)
    for computed, by_torch in zip((out, dots, unit, projected), expected, strict=True):
        torch.testing.assert_close(computed, by_torch, atol=1e-4, rtol=1e-4)


def weighted_segment_sum(source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """out[b] = Σ_{j in offsets[b]:offsets[b+1]} weight[j] · source[index[j]]: [bags, d]."""
    if kernels := kernels_for(source, weight):
        return kernels.weighted_segment_sum(source, index, offsets, weight)
    if source.device.type == "mps":
        return rows_added(source, index, offsets, weight)
    return F.embedding_bag(index, source, offsets, mode="sum", per_sample_weights=weight, include_last_offset=True)


def segment_dot(g: Tensor, bag: Tensor, rows: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """g[bag[j]] · rows[index[j]] for entry j [n]: the gradient of `weighted_segment_sum`'s weights, g = ∂L/∂out."""
    if g.device.type == "mps":
        return rows_multiplied(g, bag, rows, index)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(g, rows, index, offsets, bag, 0)


def remove_parallel_(gradient: Tensor, rows: Tensor) -> None:
    """Takes the part of gradient [n, d] along rows of unit norm away, in place."""
    if (kernels := kernels_for(gradient, rows)) and gradient.stride(1) == rows.stride(1) == 1:
        kernels.remove_parallel_(gradient, rows)
    else:
        gradient.addcmul_(rows, -(gradient * rows).sum(1, keepdim=True))  # vecdot would be cast by autocast


def normalize_rows_(rows: Tensor) -> None:
    """Rows [n, d] of unit norm, in place; those of zeros stay."""
    if (kernels := kernels_for(rows)) and rows.stride(1) == 1:
        kernels.normalize_rows_(rows, SMALLEST_NORM)
    else:
        rows.div_(torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=SMALLEST_NORM))


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
    for block in row_blocks(len(index), source.shape[1] * source.element_size(), GATHER_BYTES):
        out.index_add_(0, bag[block], source[index[block]] * weight[block, None])
    return out


def rows_multiplied(g: Tensor, bag: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """g[bag[j]] · rows[index[j]] for every entry, [n], by index."""
    blocks = row_blocks(len(index), rows.shape[1] * rows.element_size(), GATHER_BYTES)
    dots = [(g[bag[block]] * rows[index[block]]).sum(1) for block in blocks]
    return torch.cat(dots) if dots else g.new_zeros(0)


def row_blocks(n_rows: int, row_bytes: int, most_bytes: int) -> list[slice]:
    """Slices of n rows, each of as many as fit in so many bytes, and of one at least."""
    size = max(1, most_bytes // max(1, row_bytes))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]
