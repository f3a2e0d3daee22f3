"""The encoder's pass over a batch, z = W_enc x_c + bias chunk by chunk of rows, and the selection of entries from z.

A fresh [rows, F] tensor costs a CPU more than the arithmetic on it: the C library hands large blocks out as new pages
and the system clears them first. So z lies in a `Workspace` that is used again, which one trainer's autoencoders
share, and the batch is cut into as few chunks of rows as its budget allows: each product reads the whole weight
matrix, so short chunks are slow.

Entries are selected without sorting those that are certainly not active:

- `top_k`: the k largest of each token are looked for in the k groups of columns with the largest maxima, which are
  found the same way, so that no selection is from more than about 8 k entries. On CUDA groups are of 16: on an H200,
  64 of 65,536 for 4,096 tokens take .70 ms in place of torch.topk's 2.0.
- `above`: every entry over a bound. Columns are looked at in groups of eight first (an elementwise maximum over slabs
  F/8 wide, which is memory-bound); only groups whose maximum is over the bound are read again.
- `batch_top_k`: the n largest of the whole batch (BatchTopK). A bound below the n-th largest is read from a sample of
  the first chunk's group maxima, `above` lists what exceeds it (little more than n entries), and only these are
  selected from. The result is exact: when fewer than n entries exceed the bound, zero is taken.

Ties are broken arbitrarily, as in `torch.topk`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sae.sparse.activations import SparseActs
from sae.sparse.shards import FeatureShards

AUX_TOKENS = 512
"""Tokens of a batch on which dead features reconstruct the error."""
CPU_CHUNK_BYTES = 64 * 2**20
"""Largest [rows, F] intermediate on a CPU."""
GPU_CHUNK_BYTES = 2 * 2**30
"""Largest [rows, F] intermediate elsewhere."""
MIN_CHUNK_ROWS = 256
GROUP = 8
"""Entries looked at together."""
CUDA_GROUP = 16
"""The same in `top_k` on CUDA."""
SAMPLE = 2**16
"""Group maxima sorted to find a bound."""
MARGIN = 1.3
"""How many times the wanted number of entries the bound should let through."""


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
        aux_tokens: int | None = None,
        shards: FeatureShards | None = None,
    ):
        """aux_tokens: the tokens, of the first, that AuxK reads; AUX_TOKENS by default. shards: how features, of which
        these are some, are shared out over processes, `k_aux` being at most the number of dead ones of all.
        """
        self.aux_tokens = AUX_TOKENS if aux_tokens is None else aux_tokens
        self.workspace = workspace or Workspace()
        self.x_c, self.W_enc, self.bias = x_c, W_enc.detach(), None if bias is None else bias.detach()
        self.dead = dead  # [n_dead] indices, sorted
        self.shards = shards
        here = 0 if dead is None else len(dead)
        self.k_aux = min(k_aux, here) if shards is None else k_aux
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
            if self.k_aux and self.dead is not None and rows.start < self.aux_tokens:
                dead_z = z[: self.aux_tokens - rows.start, self.dead]  # [n, n_dead]
                dead_z = dead_z if lowest is None else dead_z + lowest[self.dead]
                value, index = self.largest(dead_z, self.k_aux)
                self._aux.append((value, self.dead[index]))
            yield z

    def largest(self, z: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and columns [N, k] of the k largest z [N, n] of each token. Where features are shared out, fewer may
        be here; -inf stands for those that are not among the largest of all processes.
        """
        here = min(k, z.shape[1])
        value, column = top_k(z, here) if here else (z, z.long())
        if self.shards is not None:
            value = value.masked_fill(~self.shards.among_largest(value, k), -torch.inf)
        return value, column

    def entries(self, chunks: Sequence[tuple[Tensor, Tensor]]) -> SparseActs:
        """Values and features [N, k] of consecutive chunks of rows, as `largest` has them, in one list."""
        value, feature = (torch.cat(column) for column in zip(*chunks, strict=True))
        n_features = len(self.W_enc)
        if self.shards is None:
            return SparseActs.fixed_k(feature, value, n_features)
        n_tokens, (token, column) = len(value), (value > -torch.inf).nonzero(as_tuple=True)
        value, feature = value[token, column], feature[token, column]
        return SparseActs(token, feature, value, n_tokens=n_tokens, n_features=n_features)

    def aux_acts(self) -> SparseActs | None:
        """The AuxK entries of the last pass."""
        return self.entries(self._aux) if self._aux else None


# ---- selection


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and features [N, k] of the k largest z [N, F] of each token, in no order."""
    size = GROUP if z.device.type == "cpu" else CUDA_GROUP
    n_groups, rest = divmod(z.shape[1], size)
    if rest or n_groups < 2 * k or z.device.type == "mps":
        value, feature = z.topk(k, dim=-1, sorted=False)
        return value, feature
    _, group = top_k(z.view(len(z), size, n_groups).amax(1), k)
    members = torch.arange(0, z.shape[1], n_groups, device=z.device)[:, None] + group[:, None]  # [N, g, k]
    members = members.flatten(1)
    value, column = z.gather(1, members).topk(k, dim=-1, sorted=False)
    return value, members.gather(1, column)


def group_maxima(z: Tensor) -> Tensor:
    """[N, F] -> [N, F / g]: group c holds columns c, c + F/g, c + 2F/g, ...; g = 1 where 8 does not divide F."""
    n_tokens, n_features = z.shape
    size = GROUP if n_features % GROUP == 0 else 1
    return z.view(n_tokens, size, n_features // size).amax(1)


def above(z: Tensor, bound: float | Tensor = 0.0, maxima: Tensor | None = None) -> SparseActs:
    """All entries of z [N, F] that exceed the bound."""
    maxima = group_maxima(z) if maxima is None else maxima
    n_tokens, n_groups = maxima.shape
    token, group = (maxima > bound).nonzero(as_tuple=True)
    members = z.view(n_tokens, -1, n_groups)[token, :, group]  # [hits, g]
    hit, member = (members > bound).nonzero(as_tuple=True)
    feature = member * n_groups + group[hit]
    return SparseActs(token[hit], feature, members[hit, member], n_tokens=n_tokens, n_features=z.shape[1])


def lower_bound(maxima: Tensor, n: int) -> Tensor:
    """A number that about `MARGIN` times n group maxima exceed, estimated from a sample; 0 if too few are positive."""
    flat = maxima.flatten()
    stride = max(1, len(flat) // SAMPLE) | 1  # odd, so that it meets all columns
    sample = flat[::stride]
    rank = int(MARGIN * n * len(sample) / len(flat)) + 8
    return sample.topk(rank, sorted=True).values[-1].clamp(min=0) if rank < len(sample) else sample.new_zeros(())


def batch_top_k(chunks: Callable[[], Iterable[Tensor]], k: int) -> SparseActs:
    """The positive entries among the k·N largest of a batch; `chunks` gives its z chunk by chunk of rows, each time."""
    bound: Tensor | None = None
    while True:
        candidates = []
        for z in chunks():
            maxima = group_maxima(z)
            bound = lower_bound(maxima, k * len(z)) if bound is None else bound
            candidates.append(above(z, bound, maxima))
        acts = SparseActs.concatenate(candidates)
        assert bound is not None
        if len(acts.z) >= k * acts.n_tokens or bound.item() == 0.0:
            return acts.largest(k * acts.n_tokens)
        bound = torch.zeros_like(bound)
