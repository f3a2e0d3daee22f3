"""Effects of features and errors, sparse, without a dense [B, S, F] tensor.

Legend: B examples, S positions, N = B * S tokens, d model width, r width that the site's dictionary reads, F features;
index F stands for the error node, F + 1 for what a transcoder's skip connection writes.

Only features active in the clean or the patch run can have an effect; they are found chunk of tokens by chunk
(`circuits.attribution.feature_effects`, and `sparse_effects` here for formulas of the changes alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder

CHUNK_BYTES = 16 * 2**20
"""Largest [n, F] intermediate: allocators give memory back to the system, and page by page take it again, above."""

ENTRIES = ("example", "position", "feature", "value")
"""The columns of `SiteEffects`."""


@dataclass(frozen=True)
class SiteEffects:
    """Numbers of one site's nodes, sparse: entry n says that `feature[n]` of `example[n]` at `position[n]` has
    `value[n]`.
    """

    n_features: int
    """F; `feature == F` is the error node, F + 1 that of the skip connection."""
    example: Tensor
    """[n] int32."""
    position: Tensor
    """[n] int32, counted from the prompt's first real token, or the number of the span (aggregation `spans`); -1 means
    all positions at once (exact patching, `sum`).
    """
    feature: Tensor
    """[n] int32."""
    value: Tensor
    """[n] float32."""

    @staticmethod
    def concatenate(several: Iterable[SiteEffects], n_features: int | None = None) -> SiteEffects:
        """All entries one after the other; `n_features` is needed where there may be no parts."""
        several = list(several)
        if not several:
            none = torch.zeros(0, dtype=torch.int32)
            return SiteEffects(n_features or 0, none, none, none, torch.zeros(0))
        if len(several) == 1:
            return several[0]
        columns = (torch.cat([getattr(part, name) for part in several]) for name in ENTRIES)
        return SiteEffects(several[0].n_features, *columns)

    def relabel_examples(self, numbers: Tensor) -> SiteEffects:
        """The same effects with example e called `numbers[e]`."""
        return replace(self, example=numbers.to(torch.int32)[self.example.long()])

    def at_positions(self, positions: Tensor, lengths: Tensor) -> SiteEffects:
        """The same effects with `positions` [B, S] (left-padded, prompts of these lengths [B]) in place of indices."""
        example = self.example.long()
        column = self.position.long() + (positions.shape[1] - lengths.cpu())[example]
        return replace(self, position=positions.cpu()[example, column].int())

    def by_feature(self, n_examples: int) -> tuple[Tensor, Tensor]:
        """(features [k], rising, effects [k], none 0): sum over positions, mean over examples (aggregation `sum`)."""
        numbers, entries = np.unique(self.feature.numpy(), return_inverse=True)
        total = torch.from_numpy(np.bincount(entries, weights=self.value.numpy()))  # in float64
        feature = torch.from_numpy(numbers).long()[total != 0]
        return feature, (total[total != 0] / n_examples).float()

    @property
    def n_nodes(self) -> int:
        """Numbers that nodes may have: F + 1, or F + 2 where there are effects of a skip connection."""
        return max(self.n_features, int(self.feature.max()) if len(self.feature) else 0) + 1

    def summed(self, n_examples: int) -> Tensor:
        """`by_feature` for all nodes, [F + 1], or [F + 2] with a skip connection."""
        feature, effect = self.by_feature(n_examples)
        return torch.zeros(self.n_nodes).index_copy_(0, feature, effect)

    def by_position(self, n_examples: int, n_positions: int) -> Tensor:
        """Sparse COO [S, nodes]: mean over examples at each position or span (aggregation `position` or `spans`)."""
        index = torch.stack([self.position.long(), self.feature.long()])
        size = (n_positions, self.n_nodes)
        mean = self.value.double() / n_examples
        return torch.sparse_coo_tensor(index, mean, size, check_invariants=True).coalesce().float()

    def per_example(self, n_examples: int) -> Tensor:
        """[B]: sum over all nodes and positions; for integrated gradients the left side of the sum check."""
        return (
            torch.zeros(n_examples, dtype=torch.float64).index_add_(0, self.example.long(), self.value.double()).float()
        )


@dataclass(frozen=True)
class SiteStates:
    """A site in the clean and in the patch run: what is written there, and what its dictionary reads for it."""

    clean: Tensor
    """[B, S, d]."""
    patch: Tensor
    """[B, S, d]."""
    read_clean: Tensor
    """[B, S, r]: the clean tensor itself for an autoencoder."""
    read_patch: Tensor
    """[B, S, r]."""
    zero_patch: bool = False
    """Whether features and what a skip connection writes are zero in the patch run, whatever is read."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean, patch, and what is read in both."""
        return self.clean, self.patch, self.read_clean, self.read_patch

    @property
    def differ(self) -> Tensor:
        """[B, S] bool: tokens at which anything differs between the two runs."""
        differ = (self.clean != self.patch).any(-1)
        return differ if self.read_clean is self.clean else differ | (self.read_clean != self.read_patch).any(-1)


def token_chunks(n_tokens: int, n_features: int) -> Iterator[slice]:
    """Slices of tokens such that a float32 [chunk, F] tensor stays under `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (4 * n_features))
    for start in range(0, n_tokens, step):
        yield slice(start, min(start + step, n_tokens))


def feature_deltas(sae: SparseAutoencoder, x_clean: Tensor, x_patch: Tensor, *, zero_patch: bool) -> Tensor:
    """f_patch - f_clean, [..., F], of what is read, [..., r]; with `zero_patch` the patch features are 0 whatever the
    encoder says of `b_dec`.
    """
    clean = sae.encode(x_clean)
    return clean.neg_() if zero_patch else sae.encode(x_patch).sub_(clean)


def skip_delta(sae: SparseAutoencoder, x_clean: Tensor, x_patch: Tensor, *, zero_patch: bool) -> Tensor | None:
    """How what a skip connection writes changes, [..., d], by what is read, [..., r]; None where there is none."""
    if not sae.has_skip:
        return None
    return -sae.skip(x_clean) if zero_patch else sae.skip(x_patch - x_clean)


def token_indices(live: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Example and position of the n tokens `live` [B, S], two [n]; positions count from the first of `mask` [B, S]."""
    example, column = live.nonzero(as_tuple=True)
    return example.int(), (column - (mask.shape[1] - mask.sum(1))[example]).int()


def to_sparse(
    sae: SparseAutoencoder,
    tokens: tuple[Tensor, Tensor],
    value: Tensor,
    error: Tensor,
    *,
    columns: Tensor | None = None,
    skip: Tensor | None = None,
) -> SiteEffects:
    """The entries that are not zero, on the CPU.

    Args:
        sae: the autoencoder of the site; one that reconstructs exactly has no errors.
        tokens: example and position of n tokens, as `token_indices` gives them.
        value: effects of features, [n, F], or of the features `columns` [k] alone, [n, k].
        error: effects of the error, [n].
        columns: numbers of the features that `value` is about; all by default.
        skip: effects of a skip connection, [n].
    """
    n_features = sae.W_dec.shape[0]
    token, column = value.nonzero(as_tuple=True)
    wrong = error[:0] if sae.config.architecture == "identity" else error
    error_token = wrong.nonzero()[:, 0]
    skipped = error[:0] if skip is None else skip
    skip_token = skipped.nonzero()[:, 0]
    owner = torch.cat([token, error_token, skip_token])
    feature = column if columns is None else columns[column]
    others = torch.full_like(error_token, n_features), torch.full_like(skip_token, n_features + 1)
    return SiteEffects(
        n_features,
        tokens[0].to(owner.device)[owner].cpu(),
        tokens[1].to(owner.device)[owner].cpu(),
        torch.cat([feature, *others]).int().cpu(),
        torch.cat([value[token, column], error[error_token], skipped[skip_token]]).float().cpu(),
    )


Values = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor, Tensor | None]]


def sparse_effects(sae: SparseAutoencoder, of_site: SiteStates, values: Values, *, mask: Tensor) -> SiteEffects:
    """Effects by any formula of the changes, evaluated chunk of tokens by chunk.

    values(f_patch - f_clean [n, F], e_patch - e_clean [n, d], how the skip connection's part changes [n, d] or None) ->
    (effects of the features [n, F], of the errors [n], of the skip connection [n] or None).
    """
    live = mask & of_site.differ
    clean, patch, read_clean, read_patch = (x.to(sae.W_dec)[live] for x in of_site.tensors)
    example, position = token_indices(live, mask)
    n_features, zero_patch = sae.W_dec.shape[0], of_site.zero_patch
    chunks = []
    for chunk in token_chunks(len(clean), n_features):
        delta = feature_deltas(sae, read_clean[chunk], read_patch[chunk], zero_patch=zero_patch)
        skip = skip_delta(sae, read_clean[chunk], read_patch[chunk], zero_patch=zero_patch)
        error = patch[chunk] - clean[chunk] - delta @ sae.W_dec
        value, error, skip = values(delta, error if skip is None else error - skip, skip)
        chunks.append(to_sparse(sae, (example[chunk], position[chunk]), value, error, skip=skip))
    return SiteEffects.concatenate(chunks, n_features)
