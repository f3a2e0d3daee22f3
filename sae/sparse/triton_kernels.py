"""Triton kernels for the sparse part of a training step on a GPU; `sae.sparse.activations` holds their twins in torch.

The n entries of a batch lie in bags: those of a token for decoding, those of a feature for gradients of weights.

1. `weighted_segment_sum`: out[b] = Σ_{j in b} weight[j] · source[index[j]], one program a bag with a whole row of d
   columns in registers, added up in float32 whatever the rows are stored in.
2. `bag_sum_and_dots`: the same and dots[j] = source[index[j]] · rows[b]. With the entries of a feature as a bag,
   g = ∂L/∂x̂ as source and W_dec as rows these are ∂L/∂W_dec and ∂L/∂f, for one reading of g and of W_dec.
3. `remove_parallel_` and `normalize_rows_`: a gradient without its part along the rows it is for, and rows of unit
   norm.

**Long bags.** A feature that is active on every token has a bag of N entries, and one program would work on it long
after all others have ended. So a bag of more than `WINDOW` entries is left to windows: window q is entries q·WINDOW to
(q + 1)·WINDOW, whatever bags they are in, and two programs sum what it holds of the long bag that its first entry is
in, and of the one that its last entry is in; there can be no third. A second kernel adds the parts of each long bag in
their order. No atomic additions: the same input gives the same bits. Sizes depend on n alone, so the host never
waits for a result. Programs of windows come first in the grid, since they take longest.

**Bytes** through device memory, s a number, if what N tokens share (x and g, N d s) stays in the L2 cache:

  bag_sum, decoding                        (n + N) d s    reads W_dec's row for each entry, writes x̂
  bag_sum_and_dots, ∂L/∂W_dec and ∂L/∂f    (2 F + N) d s  reads W_dec and g, writes the gradient
  bag_sum, ∂L/∂W_enc                       (F + N) d s    reads x, writes the gradient
  remove_parallel_                         3 F d s
  normalize_rows_                          2 F d s

and 16 n d / WINDOW at most for parts of long bags, written and read. Their twins in torch move (n + N), (n + F + 2 N),
(F + N), 7 F and 3 F rows of d s bytes.

**Measured** on an H200 (`python -m tests.benchmarks.bench_sae_step --device cuda`), N = 4,096, k = 64 (n = 262,144),
F = 65,536, d = 2,304, s = 4: decoding .69 ms (3.5 TB/s of the 4.3 that the device copies at), the gradients of decoding
1.36 and that of W_enc .87 (.9 and .7 TB/s: x and g do not stay in the cache, so that an entry costs a row),
projection .48 and normalisation .33 (3.8 and 3.7 TB/s); in torch 1.70, 3.77, 2.73, 1.13 and .64. The encoder's product
takes 1.6 ms there, Adam's 28 bytes a weight 2.4. Tiles of 2,048 to 16,384 numbers, 256 to 1,024 numbers a warp and
windows of 32 to 512 entries were tried at d = 512, 2,304 and 4,096: none is faster than these at all three by more than
two runs differ.
"""

# mypy: disable-error-code="no-untyped-def"
# Triton reads the annotations of a kernel's parameters itself.
from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sae.sparse import activations as in_torch

WINDOW = 128
"""Entries of a bag above which it is summed in parts."""
TILE = 4096
"""Numbers that a program reads at a time, where a row is shorter than that."""


@triton.jit
def _tile(source, place, stride, columns, d, there):
    """[entries, columns] of the rows at the given places, in float32; zeros where there is nothing."""
    mask = there[:, None] & (columns < d)[None, :]
    return tl.load(source + place[:, None] * stride + columns[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _entries(program, n_parts, offsets, owners, WINDOW: tl.constexpr):
    """A program's bag, the entries of it from the first up to the last, and whether it has any to sum."""
    is_part = program < n_parts
    bag = program - n_parts
    if is_part:
        bag = tl.load(owners + program)
    first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    mine = (last - first > WINDOW) == is_part
    if is_part:
        begin = program // 2 * WINDOW
        first, last = tl.maximum(first, begin), tl.minimum(last, begin + WINDOW)
        if program % 2 == 1:
            mine = mine & (tl.load(owners + program - 1) != bag)
    return bag, first, last, mine


@triton.jit
def _bag_sum(
    out, parts, dots, source, index, weight, offsets, owners, rows, n_parts, d, source_stride, rows_stride,
    DOTS: tl.constexpr, WINDOW: tl.constexpr, HEIGHT: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
):  # fmt: skip
    """Programs below n_parts: what a window holds of a long bag, into parts; others: a short bag, into out."""
    program = tl.program_id(0).to(tl.int64)
    bag, first, last, mine = _entries(program, n_parts, offsets, owners, WINDOW)
    if mine:
        one = tl.full([1], 1, tl.int1)
        left, total_left = tl.arange(0, LEFT), tl.zeros([LEFT], tl.float32)
        if DOTS:
            row_left = _tile(rows, bag + tl.zeros([1], tl.int64), rows_stride, left, d, one)
        if RIGHT:
            right = LEFT + tl.arange(0, RIGHT)
            total_right = tl.zeros([RIGHT], tl.float32)
            if DOTS:
                row_right = _tile(rows, bag + tl.zeros([1], tl.int64), rows_stride, right, d, one)
        for start in range(first, last, HEIGHT):
            entry = start + tl.arange(0, HEIGHT)
            there = entry < last
            place = tl.load(index + entry, mask=there, other=0)
            factor = tl.load(weight + entry, mask=there, other=0.0).to(tl.float32)
            x_left = _tile(source, place, source_stride, left, d, there)
            total_left += tl.sum(factor[:, None] * x_left, 0)
            if DOTS:
                dot = tl.sum(x_left * row_left, 1)
            if RIGHT:
                x_right = _tile(source, place, source_stride, right, d, there)
                total_right += tl.sum(factor[:, None] * x_right, 0)
                if DOTS:
                    dot += tl.sum(x_right * row_right, 1)
            if DOTS:
                tl.store(dots + entry, dot, mask=there)
        if program < n_parts:
            tl.store(parts + program * d + left, total_left, mask=left < d)
            if RIGHT:
                tl.store(parts + program * d + right, total_right, mask=right < d)
        else:
            tl.store(out + bag * d + left, total_left, mask=left < d)
            if RIGHT:
                tl.store(out + bag * d + right, total_right, mask=right < d)


@triton.jit
def _add_parts(out, parts, offsets, owners, d, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """Adds up the parts of the long bag that begins in a window, if one does: it also holds the window's last entry."""
    window = tl.program_id(0).to(tl.int64)
    bag = tl.load(owners + 2 * window + 1)
    first, last = tl.load(offsets + bag), tl.load(offsets + bag + 1)
    if (last - first > WINDOW) & (first >= window * WINDOW):
        columns = tl.arange(0, BLOCK)
        inside = columns < d
        part = 2 * window + (first > window * WINDOW).to(tl.int64)
        total = tl.load(parts + part * d + columns, mask=inside, other=0.0)
        for later in range(window + 1, (last - 1) // WINDOW + 1):
            total += tl.load(parts + 2 * later * d + columns, mask=inside, other=0.0)
        tl.store(out + bag * d + columns, total, mask=inside)


@triton.jit
def _project(gradient, rows, d, gradient_stride, rows_stride, BLOCK: tl.constexpr):
    number, columns = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = columns < d
    cells = gradient + number * gradient_stride + columns
    g = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    row = tl.load(rows + number * rows_stride + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(cells, g - tl.sum(g * row, 0) * row, mask=inside)


@triton.jit
def _normalise(rows, d, rows_stride, smallest, BLOCK: tl.constexpr):
    cells = rows + tl.program_id(0).to(tl.int64) * rows_stride + tl.arange(0, BLOCK)
    inside = tl.arange(0, BLOCK) < d
    row = tl.load(cells, mask=inside, other=0.0).to(tl.float32)
    tl.store(cells, row / tl.maximum(tl.sqrt(tl.sum(row * row, 0)), smallest), mask=inside)


class Shape(NamedTuple):
    """Entries and columns that a program of `_bag_sum` holds; tiles are powers of two, so a row lies in two of them."""

    height: int
    """Entries."""
    left: int
    """Columns of the first tile: the largest power of two that d has room for."""
    right: int
    """Columns of the second tile, for the rest; 0 for none."""
    warps: int

    @classmethod
    def of(cls, d: int) -> Shape:
        """The shape for rows of d numbers."""
        left = triton.next_power_of_2(d + 1) // 2
        right = triton.next_power_of_2(d - left) if d > left else 0
        height = max(1, min(8, TILE // left))
        return cls(height, left, right, warps_of(height * left))


def warps_of(numbers: int) -> int:
    """Warps for a program that holds so many numbers at a time: 32 a thread."""
    return max(1, min(16, numbers // 1024))


def weighted_segment_sum(source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """out[b] = Σ_{j in offsets[b]:offsets[b+1]} weight[j] · source[index[j]]: [bags, d]."""
    return _launch(source, index, offsets, weight, None)[0]


def bag_sum_and_dots(
    source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """`weighted_segment_sum`, and source[index[j]] · rows[bag of j] for every entry: [bags, d], [n]."""
    out, dots = _launch(source, index, offsets, weight, rows)
    assert dots is not None
    return out, dots


def _launch(
    source: Tensor, index: Tensor, offsets: Tensor, weight: Tensor, rows: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    n, n_bags, d = len(index), len(offsets) - 1, source.shape[1]
    source, index, weight = _by_rows(source), index.contiguous(), weight.contiguous()
    out = source.new_empty(n_bags, d)
    dots = None if rows is None else torch.empty_like(weight)
    rows = source if rows is None else _by_rows(rows)
    n_windows = triton.cdiv(n, WINDOW) if n > WINDOW else 0
    owners = _owners(offsets, n, n_windows)
    parts = source.new_empty(2 * n_windows, d, dtype=torch.float32)
    shape, block = Shape.of(d), triton.next_power_of_2(d)
    if n_bags:
        with torch.cuda.device_of(source):
            _bag_sum[(2 * n_windows + n_bags,)](
                out, parts, weight if dots is None else dots, source, index, weight, offsets, owners, rows,
                2 * n_windows, d, source.stride(0), rows.stride(0), DOTS=dots is not None, WINDOW=WINDOW,
                HEIGHT=shape.height, LEFT=shape.left, RIGHT=shape.right, num_warps=shape.warps,
            )  # fmt: skip
            if n_windows:
                _add_parts[(n_windows,)](
                    out, parts, offsets, owners, d, WINDOW=WINDOW, BLOCK=block, num_warps=warps_of(block)
                )
    return out, dots


def _owners(offsets: Tensor, n: int, n_windows: int) -> Tensor:
    """The bags that the first and the last entry of each window are in: [2 · windows]."""
    return torch.searchsorted(offsets, _window_ends(n, n_windows, WINDOW, offsets.device), right=True) - 1


@lru_cache(maxsize=8)
def _window_ends(n: int, n_windows: int, size: int, device: torch.device) -> Tensor:
    """The first and the last entry of each window: [2 · windows]. A training asks for the same ones step after step."""
    starts = size * torch.arange(n_windows, device=device)
    return torch.stack([starts, (starts + size - 1).clamp(max=n - 1)], 1).flatten()


def remove_parallel_(gradient: Tensor, rows: Tensor) -> None:
    """gradient[i] −= (gradient[i] · rows[i]) rows[i], in place; rows of unit norm."""
    block = triton.next_power_of_2(rows.shape[1])
    with torch.cuda.device_of(rows):
        _project[(len(rows),)](
            gradient, rows, rows.shape[1], gradient.stride(0), rows.stride(0), BLOCK=block, num_warps=warps_of(block)
        )


def normalize_rows_(rows: Tensor, smallest: float) -> None:
    """rows[i] /= max(‖rows[i]‖, smallest), in place."""
    block = triton.next_power_of_2(rows.shape[1])
    with torch.cuda.device_of(rows):
        _normalise[(len(rows),)](rows, rows.shape[1], rows.stride(0), smallest, BLOCK=block, num_warps=warps_of(block))


def _by_rows(x: Tensor) -> Tensor:
    """x with its rows in one piece each; they may lie anywhere, also on top of each other."""
    return x if x.stride(1) == 1 else x.contiguous()


@torch.no_grad()
def check(device: torch.device | str) -> None:
    """Raise an AssertionError where the kernels do not agree with torch on a few bags, empty, short and long."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    lengths = torch.tensor([0, 3, 1, 2 * WINDOW + 5, 40, WINDOW + 1, 0])
    bag = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)
    offsets = F.pad(lengths.cumsum(0), (1, 0)).to(device)
    index = torch.randint(50, (len(bag),), generator=generator).to(device)
    source, rows, weight = normal(50, 96), normal(len(lengths), 96), normal(len(bag))
    out, dots = bag_sum_and_dots(source, index, offsets, weight, rows)
    unit, projected = rows.clone(), out.clone()
    normalize_rows_(unit, in_torch.SMALLEST_NORM)
    remove_parallel_(projected, unit)
    with in_torch.using("torch"):
        twin, twin_out = rows.clone(), in_torch.weighted_segment_sum(source, index, offsets, weight)
        in_torch.normalize_rows_(twin)
        twin_projected = twin_out.clone()
        in_torch.remove_parallel_(twin_projected, twin)
    expected = (twin_out, (source[index] * rows[bag]).sum(1), twin, twin_projected)
    for computed, by_torch in zip((out, dots, unit, projected), expected, strict=True):
        torch.testing.assert_close(computed, by_torch, atol=1e-4, rtol=1e-4)
