"""Effects of features and errors, sparse, without a dense [B, S, F] tensor.

Legend: B examples, S positions, N = B * S tokens, d model width, F features; index F stands for the error node.

Only features active in the clean or the patch run can have an effect; they are found chunk of tokens by chunk
(`circuits.attribution.feature_effects`, and `sparse_effects` here for formulas of the changes alone).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

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
    """F; `feature == F` is the error node."""
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
        """(features [k], rising, effects [k]): sum over positions, mean over examples (aggregation `sum`)."""
        feature, entry = self.feature.long().unique(return_inverse=True)
        total = torch.zeros(len(feature), dtype=torch.float64).index_add_(0, entry, self.value.double())
        return feature, (total / n_examples).float()

    def summed(self, n_examples: int) -> Tensor:
        """`by_feature` for all features, [F + 1]."""
        feature, effect = self.by_feature(n_examples)
        return torch.zeros(self.n_features + 1).index_copy_(0, feature, effect)

    def by_position(self, n_examples: int, n_positions: int) -> Tensor:
        """Sparse COO [S, F + 1]: mean over examples at each position or span (aggregation `position` or `spans`)."""
        index = torch.stack([self.position.long(), self.feature.long()])
        size = (n_positions, self.n_features + 1)
        mean = self.value.double() / n_examples
        return torch.sparse_coo_tensor(index, mean, size, check_invariants=True).coalesce().float()

    def per_example(self, n_examples: int) -> Tensor:
        """[B]: sum over all nodes and positions; for integrated gradients the left side of the sum check."""
        return (
            torch.zeros(n_examples, dtype=torch.float64).index_add_(0, self.example.long(), self.value.double()).float()
        )


def token_chunks(n_tokens: int, n_features: int) -> Iterator[slice]:
    """Slices of tokens such that a float32 [chunk, F] tensor stays under `CHUNK_BYTES`."""
    step = max(1, CHUNK_BYTES // (4 * n_features))
    for start in range(0, n_tokens, step):
        yield slice(start, min(start + step, n_tokens))


def feature_deltas(sae: SparseAutoencoder, x_clean: Tensor, x_patch: Tensor, *, zero_patch: bool) -> Tensor:
    """f_patch - f_clean, [..., F]; with `zero_patch` the patch features are 0 whatever the encoder says of `b_dec`."""
    clean = sae.encode(x_clean)
    return clean.neg_() if zero_patch else sae.encode(x_patch).sub_(clean)


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
) -> SiteEffects:
    """The entries that are not zero, on the CPU.

    Args:
        sae: the autoencoder of the site; one that reconstructs exactly has no errors.
        tokens: example and position of n tokens, as `token_indices` gives them.
        value: effects of features, [n, F], or of the features `columns` [k] alone, [n, k].
        error: effects of the error, [n].
        columns: numbers of the features that `value` is about; all by default.
    """
    n_features = sae.W_dec.shape[0]
    token, column = value.nonzero(as_tuple=True)
    wrong = error[:0] if sae.config.architecture == "identity" else error
    error_token = wrong.nonzero()[:, 0]
    owner = torch.cat([token, error_token])
    feature = column if columns is None else columns[column]
    return SiteEffects(
        n_features,
        tokens[0].to(owner.device)[owner].cpu(),
        tokens[1].to(owner.device)[owner].cpu(),
        torch.cat([feature, torch.full_like(error_token, n_features)]).int().cpu(),
        torch.cat([value[token, column], error[error_token]]).float().cpu(),
    )


Values = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def sparse_effects(
    sae: SparseAutoencoder,
    x_clean: Tensor,
    x_patch: Tensor,
    values: Values,
    *,
    mask: Tensor,
    zero_patch: bool = False,
) -> SiteEffects:
    """Effects by any formula of the changes, evaluated chunk of tokens by chunk.

    values(f_patch - f_clean [n, F], x_patch - x_clean [n, d]) -> (effects of the features [n, F], of the errors [n]).
    """
    live = mask & (x_clean != x_patch).any(-1)
    clean, patch = (x.to(sae.W_dec)[live] for x in (x_clean, x_patch))
    example, position = token_indices(live, mask)
    n_features = sae.W_dec.shape[0]
    chunks = []
    for chunk in token_chunks(len(clean), n_features):
        delta = feature_deltas(sae, clean[chunk], patch[chunk], zero_patch=zero_patch)
        value, error = values(delta, patch[chunk] - clean[chunk])
        chunks.append(to_sparse(sae, (example[chunk], position[chunk]), value, error))
    return SiteEffects.concatenate(chunks, n_features)
