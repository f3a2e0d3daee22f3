"""Matrix products of a training step, into memory that is used again.

A fresh [rows, F] tensor costs a CPU more than the arithmetic on it: the C library hands large blocks out as new pages
and the system clears them first. So intermediates of that size live in a `Workspace`, which one trainer's autoencoders
share, and the batch is cut into as few chunks of rows as its budget allows: each product reads the whole weight
matrix, so short chunks are slow. Under autocast products are made in its dtype and results are float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_CHUNK_BYTES = 64 * 2**20
"""Largest [rows, F] intermediate on a CPU."""
GPU_CHUNK_BYTES = 2 * 2**30
"""Largest [rows, F] intermediate elsewhere."""
MIN_CHUNK_ROWS = 256


class Workspace:
    """Buffers by number, made when first asked for and used again from then on."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def take(self, number: int, rows: int, columns: int, like: Tensor) -> Tensor:
        """A [rows, columns] tensor of that kind with arbitrary content, valid until the same number is taken again."""
        key = number, like.device, like.dtype
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < rows * columns:
            buffer = self._buffers[key] = torch.empty(rows * columns, device=like.device, dtype=like.dtype)
        return buffer[: rows * columns].view(rows, columns)

    @property
    def n_bytes(self) -> int:
        """Memory of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


def chunk_rows(n_rows: int, n_features: int, device: torch.device) -> int:
    """Rows of a chunk whose [rows, F] intermediate fits the budget of the device; chunks are equally long."""
    budget = CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES
    most = max(MIN_CHUNK_ROWS, budget // (4 * n_features))
    return -(-n_rows // -(-n_rows // most))


def row_chunks(n_rows: int, n_features: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch, each of `chunk_rows` rows."""
    rows = chunk_rows(n_rows, n_features, device)
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def linear(x: Tensor, W: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias [n, F], in `out` if it is given."""
    if torch.is_autocast_enabled(x.device.type):
        z = torch.nn.functional.linear(x, W, bias)
        return z.float() if out is None else out.copy_(z)
    return torch.mm(x, W.T, out=out) if bias is None else torch.addmm(bias, x, W.T, out=out)


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a b, in place; a b where there is no total yet."""
    if torch.is_autocast_enabled(a.device.type):
        product = (a @ b).float()
        return product if total is None else total.add_(product)
    return torch.mm(a, b) if total is None else total.addmm_(a, b)
