"""The encoder's pass over a batch: z = W_enc x_c + bias, chunk by chunk of rows, from which entries are selected.

A fresh [rows, F] tensor costs a CPU more than the arithmetic on it: the C library hands large blocks out as new pages
and the system clears them first. So z lies in a `Workspace` that is used again, which one trainer's autoencoders
share, and the batch is cut into as few chunks of rows as its budget allows: each product reads the whole weight
matrix, so short chunks are slow.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.sparse.activations import SparseActs
from sae.sparse.selection import top_k

AUX_TOKENS = 512
"""Tokens of a batch on which dead features reconstruct the error."""
CPU_CHUNK_BYTES = 64 * 2**20
"""Largest [rows, F] intermediate on a CPU."""
GPU_CHUNK_BYTES = 2 * 2**30
"""Largest [rows, F] intermediate elsewhere."""
MIN_CHUNK_ROWS = 256


class Workspace:
    """Memory for pre-activations, made when first asked for and used again from then on."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def take(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """A [rows, columns] tensor of that kind with arbitrary content, valid until the next is taken."""
        buffer = self._buffer
        if (buffer.device, buffer.dtype) != (like.device, like.dtype) or buffer.numel() < rows * columns:
            buffer = self._buffer = torch.empty(rows * columns, device=like.device, dtype=like.dtype)
        return buffer[: rows * columns].view(rows, columns)

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return self._buffer.numel() * self._buffer.element_size()


def row_chunks(n_rows: int, n_features: int, device: torch.device, *, cpu_bytes: int | None = None) -> Iterator[slice]:
    """Slices of the batch whose [rows, F] intermediate fits the budget of the device; they are equally long."""
    budget = (cpu_bytes or CPU_CHUNK_BYTES) if device.type == "cpu" else GPU_CHUNK_BYTES
    most = max(MIN_CHUNK_ROWS, budget // (4 * n_features))
    rows = -(-n_rows // -(-n_rows // most))
    for start in range(0, n_rows, rows):
        yield slice(start, min(start + rows, n_rows))


def linear(x: Tensor, W: Tensor, bias: Tensor | None, *, out: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias [n, F], in `out` if it is given; the product in autocast's dtype, the result in float32."""
    if torch.is_autocast_enabled(x.device.type):
        z = F.linear(x, W, bias)
        return z.float() if out is None else out.copy_(z)
    return torch.mm(x, W.T, out=out) if bias is None else torch.addmm(bias, x, W.T, out=out)


class EncoderPass:
    """Pre-activations of a batch in chunks of rows; picks the AuxK entries on the way."""

    def __init__(
        self,
        x_c: Tensor,
        W_enc: Tensor,
        bias: Tensor | None,
        *,
        dead: Tensor | None = None,
        k_aux: int = 0,
        workspace: Workspace | None = None,
    ):
        self.workspace = workspace or Workspace()
        self.x_c, self.W_enc, self.bias = x_c, W_enc.detach(), None if bias is None else bias.detach()
        self.dead = dead  # [n_dead] indices, sorted
        self.k_aux = 0 if dead is None else min(k_aux, len(dead))
        self._aux: list[tuple[Tensor, Tensor]] = []

    def chunks(self, lowest: Tensor | None = None) -> Iterator[Tensor]:
        """z [rows, F] of one chunk after another; z − lowest if it is given, at no cost. A z lasts until the next.

        Under autocast z has its dtype; `SparseActs.encode` gives what was selected the weights' dtype again.
        """
        self._aux = []
        bias = self.bias
        if lowest is not None:
            bias = -lowest if bias is None else bias - lowest
        for rows in row_chunks(len(self.x_c), len(self.W_enc), self.x_c.device):
            x_c = self.x_c[rows]
            if torch.is_autocast_enabled(x_c.device.type):  # half as many bytes for what selects from z
                z = F.linear(x_c, self.W_enc, bias)
            else:
                z = linear(x_c, self.W_enc, bias, out=self.workspace.take(len(x_c), len(self.W_enc), self.W_enc))
            if self.k_aux and self.dead is not None and rows.start < AUX_TOKENS:
                dead_z = z[: AUX_TOKENS - rows.start, self.dead]  # [n, n_dead]
                dead_z = dead_z if lowest is None else dead_z + lowest[self.dead]
                value, index = top_k(dead_z, self.k_aux)
                self._aux.append((value, self.dead[index]))
            yield z

    def aux_acts(self) -> SparseActs | None:
        """The AuxK entries of the last pass."""
        if not self._aux:
            return None
        value, feature = (torch.cat(column) for column in zip(*self._aux, strict=True))
        return SparseActs.fixed_k(feature, value, len(self.W_enc))
