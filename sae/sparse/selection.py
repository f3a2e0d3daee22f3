"""Which entries of a batch are active: selection without sorting what is certainly not.

- `top_k`: the k largest of each token. On a CPU they are looked for in the k groups of columns with the largest maxima,
  which are found the same way, so that no selection is from more than about 8 k entries.
- `above`: every entry over a bound. Columns are looked at in groups of eight first (an elementwise maximum over slabs
  F/8 wide, which is memory-bound); only groups whose maximum is over the bound are read again.
- `BatchSelector`: the n largest of the whole batch (BatchTopK). A bound below the n-th largest is read from a
  sample of the group maxima, `above` lists what exceeds it (little more than n entries), and only these are
  selected from. The result is exact: when fewer than n entries exceed the bound, a lower one is taken.

Ties are broken arbitrarily, as in `torch.topk`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae.sparse.activations import SparseActs

GROUP = 8
"""Entries looked at together."""
SAMPLE = 2**16
"""Group maxima sorted to find a bound."""
MARGIN = 1.3
"""How many times the wanted number of entries the bound should let through."""


def top_k(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and features [N, k] of the k largest z [N, F] of each token, in no order."""
    maxima = group_maxima(z)
    n_groups = maxima.shape[1]
    if z.device.type != "cpu" or n_groups == z.shape[1] or n_groups < 2 * k:
        value, feature = z.topk(k, dim=-1, sorted=False)
        return value, feature
    _, group = top_k(maxima, k)
    members = torch.arange(0, z.shape[1], n_groups)[:, None] + group[:, None]  # [N, g, k]
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


class BatchSelector:
    """The positive entries among the k·N largest of a batch, fed chunk by chunk of rows."""

    def __init__(self, k: int, n_tokens: int):
        self.k, self.n_tokens = k, n_tokens
        self.bound: Tensor | None = None

    def candidates(self, z: Tensor) -> SparseActs:
        """Entries of a chunk z [n, F] that may be among the largest; the first chunk sets the bound."""
        maxima = group_maxima(z)
        if self.bound is None:
            self.bound = lower_bound(maxima, self.k * len(z))
        return above(z, self.bound, maxima)

    def enough(self, candidates: SparseActs) -> bool:
        """Whether the candidates of the whole batch hold its largest; if not, the bound becomes 0 for another pass."""
        assert self.bound is not None
        enough = len(candidates.z) >= self.k * self.n_tokens or self.bound.item() == 0.0
        self.bound = self.bound if enough else torch.zeros_like(self.bound)
        return enough
