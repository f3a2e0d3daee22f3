"""From gradients in model space to the effect of every feature and error, without a dense [B, S, F] tensor.

Legend: B examples, S positions, N = B * S tokens, d model width, F features; index F stands for the error node.

Decoding is affine, x = f W_dec + b_dec + e, so with the gradient g = dm/dx of a site ([B, S, d], at the clean run for
attribution patching, averaged along the path for integrated gradients; Marks et al. 2024, eq. 3 and 4):

1. effect of feature i at (b, s) = (f_patch - f_clean)_i * (W_dec[i] . g),
2. effect of the error at (b, s) = (e_patch - e_clean) . g,
3. hence their sum is (x_patch - x_clean) . g, and the error's effect is that minus the sum of the features'.

Only features active in the clean or the patch run can have an effect; they are found and contracted chunk of tokens
by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from sae.autoencoder import SparseAutoencoder

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class SiteEffects:
    """Effects of one site's nodes, sparse: entry n says that `feature[n]` of `example[n]` at `position[n]` has
    `value[n]`.
    """

    n_features: int
    """F; `feature == F` is the error node."""
    example: torch.Tensor
    """[n] int32."""
    position: torch.Tensor
    """[n] int32, counted from the prompt's first real token, or the number of the span (aggregation `spans`); -1 means
    all positions at once (exact patching, `sum`).
    """
    feature: torch.Tensor
    """[n] int32."""
    value: torch.Tensor
    """[n] float32."""

    @staticmethod
    def concatenate(parts: Iterable[SiteEffects]) -> SiteEffects:
        parts = list(parts)
        fields = ("example", "position", "feature", "value")
        return SiteEffects(
            parts[0].n_features, *(torch.cat([getattr(part, name) for part in parts]) for name in fields)
        )

    def relabel_examples(self, numbers: torch.Tensor) -> SiteEffects:
        """The same effects with example e called `numbers[e]`."""
        example = numbers.to(torch.int32)[self.example.long()]
        return SiteEffects(self.n_features, example, self.position, self.feature, self.value)

    def at_places(self, places: torch.Tensor, lengths: torch.Tensor) -> SiteEffects:
        """The same effects with each token's place [B, S] (left-padded, prompts of these lengths [B]) as position."""
        example = self.example.long()
        column = self.position.long() + (places.shape[1] - lengths.cpu())[example]
        return SiteEffects(self.n_features, self.example, places.cpu()[example, column].int(), self.feature, self.value)

    def summed(self, n_examples: int) -> torch.Tensor:
        """[F + 1]: sum over positions, mean over examples (aggregation `sum`)."""
        total = torch.zeros(self.n_features + 1, dtype=torch.float64)
        total.index_add_(0, self.feature.long(), self.value.double())
        return (total / n_examples).float()

    def by_position(self, n_examples: int, n_positions: int) -> torch.Tensor:
        """Sparse COO [S, F + 1]: mean over examples at each position or span (aggregation `position` or `spans`)."""
        index = torch.stack([self.position.long(), self.feature.long()])
        size = (n_positions, self.n_features + 1)
        mean = self.value.double() / n_examples
        return torch.sparse_coo_tensor(index, mean, size, check_invariants=True).coalesce().float()

    def per_example(self, n_examples: int) -> torch.Tensor:
        """[B]: sum over all nodes and positions; for integrated gradients the completeness identity's left side."""
        return (
            torch.zeros(n_examples, dtype=torch.float64).index_add_(0, self.example.long(), self.value.double()).float()
        )


def token_chunks(n_tokens: int, n_features: int, *, chunk_bytes: int = CHUNK_BYTES) -> Iterator[slice]:
    """Slices of tokens such that a float32 [chunk, F] tensor stays under `chunk_bytes`."""
    step = max(1, chunk_bytes // (4 * n_features))
    for start in range(0, n_tokens, step):
        yield slice(start, min(start + step, n_tokens))


def feature_deltas(
    sae: SparseAutoencoder, x_clean: torch.Tensor, x_patch: torch.Tensor, *, zero_patch: bool
) -> torch.Tensor:
    """f_patch - f_clean, [..., F]; with `zero_patch` the patch features are 0 whatever the encoder says of `b_dec`."""
    clean = sae.encode(x_clean)
    return clean.neg_() if zero_patch else sae.encode(x_patch).sub_(clean)


@torch.no_grad()
def contract_gradient(
    sae: SparseAutoencoder,
    x_clean: torch.Tensor,
    x_patch: torch.Tensor,
    gradient: torch.Tensor,
    *,
    mask: torch.Tensor,
    zero_patch: bool = False,
) -> SiteEffects:
    """Effects of all features and the error of one site.

    x_clean, x_patch, gradient: [B, S, d]; mask: [B, S] bool, True at real tokens (left-padded). Returns sparse
    effects on the CPU whose zero entries are left out; positions count from each prompt's first real token.
    """

    def values(delta: torch.Tensor, dx: torch.Tensor, g: torch.Tensor, token: torch.Tensor, feature: torch.Tensor):
        value = delta.mul_(g @ sae.W_dec.T)[token, feature]
        return value, (dx * g).sum(-1).index_add(0, token, value, alpha=-1)

    return sparse_effects(sae, x_clean, x_patch, values, gradient, mask=mask, zero_patch=zero_patch)


Values = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def sparse_effects(
    sae: SparseAutoencoder,
    x_clean: torch.Tensor,
    x_patch: torch.Tensor,
    values: Values,
    *extra: torch.Tensor,
    mask: torch.Tensor,
    zero_patch: bool = False,
) -> SiteEffects:
    """Effects by any formula, evaluated chunk of tokens by chunk at the features and errors that differ.

    values(delta [n, F], x_patch - x_clean [n, d], *extra at these tokens, token [k], feature [k]) -> (effects of the
    k features that differ, effects of the n errors). A dictionary that reconstructs exactly has no errors.
    """
    changed = mask & (x_clean != x_patch).any(-1)
    example, column = changed.nonzero(as_tuple=True)
    position = column - (mask.shape[1] - mask.sum(1))[example]
    clean, patch, *more = (x.to(sae.W_dec.device).float()[changed] for x in (x_clean, x_patch, *extra))
    n_features = sae.W_dec.shape[0]
    exact = sae.config.architecture == "identity"
    tokens, features, parts = [], [], []
    for chunk in token_chunks(len(clean), n_features):
        delta = feature_deltas(sae, clean[chunk], patch[chunk], zero_patch=zero_patch)
        token, feature = delta.nonzero(as_tuple=True)
        value, error = values(delta, patch[chunk] - clean[chunk], *(x[chunk] for x in more), token, feature)
        n_tokens = len(error)
        tokens += [token + chunk.start, torch.arange(chunk.start, chunk.start + n_tokens, device=token.device)]
        features += [feature, torch.full((n_tokens,), n_features, device=feature.device)]
        parts += [value, torch.zeros_like(error) if exact else error]
    if not tokens:
        nothing = torch.zeros(0, dtype=torch.int32)
        return SiteEffects(n_features, nothing, nothing, nothing, torch.zeros(0))
    token, feature, value = torch.cat(tokens), torch.cat(features), torch.cat(parts)
    kept = value != 0
    token, feature, value = token[kept], feature[kept], value[kept]
    return SiteEffects(
        n_features,
        example.to(token.device)[token].int().cpu(),
        position.to(token.device)[token].int().cpu(),
        feature.int().cpu(),
        value.cpu(),
    )
