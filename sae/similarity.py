"""Which features of two dictionaries are the same: by direction, and by when they fire.

1. `nearest_features`: the features whose decoder rows point most nearly the same way (cosine), of one dictionary or of
   another one (another layer, width or seed).
2. `match_features`: for every feature of a, its best partner in b by decoder cosine, and whether the choice is mutual.
   The mean of the best cosines is the mean max cosine similarity of Sharkey et al. 2022.
3. `match_by_activation`: the same by the Pearson correlation of activations over the tokens of a text, for dictionaries
   whose directions cannot be compared (attention output against residual stream, two models). The sums
   Σ f_i g_j are kept sparse over tokens and dense over chosen features.
4. `persistent_features` and `split_features` read a match: what stays between layers, what a wider dictionary splits.

Everything is computed in blocks of rows that fit in `chunk_bytes`: no [F_a, F_b] matrix unless it is that small.

Shapes: F_a and F_b features of dictionaries a and b, n the features asked about, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae.errors import UserError

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Match:
    """For each feature of dictionary a, its best partner in dictionary b."""

    partner: Tensor
    """[F_a] int64 index in b of the most similar feature."""
    similarity: Tensor
    """[F_a] cosine or correlation with it."""
    mutual: Tensor
    """[F_a] bool, whether the partner's best feature in a is this one."""

    @property
    def mean(self) -> float:
        """Mean over features of the similarity with the best partner."""
        return float(self.similarity.double().mean())


def nearest_features(
    W_dec: Tensor,
    features: Tensor,
    *,
    among: Tensor | None = None,
    k: int = 5,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """The k features with the largest decoder cosine: their cosines [n, k] and indices [n, k], best first.

    W_dec: [F, d]; features: [n] indices of the rows asked about; among: [F_b, d], the decoder of another dictionary (by
    default the same one, a feature itself excluded).
    """
    other = W_dec if among is None else among
    _check_width(W_dec, other)
    k = min(k, len(other) - (among is None))
    rows, columns = normalize(W_dec[features].float(), dim=-1), normalize(other.float(), dim=-1)
    found = []
    for part in _blocks(len(rows), len(columns), chunk_bytes):
        cosine = rows[part] @ columns.T  # [block, F_b]
        if among is None:
            cosine.scatter_(1, features[part, None], -torch.inf)
        found.append(cosine.topk(k, dim=-1))
    if not found:
        return rows.new_zeros(0, k), features.new_zeros(0, k)
    return torch.cat([t.values for t in found]), torch.cat([t.indices for t in found])


def match_features(a: Tensor, b: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> Match:
    """Best partners by the cosine of decoder rows. a: [F_a, d]; b: [F_b, d]."""
    _check_width(a, b)
    rows, columns = normalize(a.float(), dim=-1), normalize(b.float(), dim=-1)
    return _match(lambda part: rows[part] @ columns.T, len(a), len(b), chunk_bytes)


def _match(block: Callable[[slice], Tensor], n_a: int, n_b: int, chunk_bytes: int) -> Match:
    """Row and column maxima of a similarity matrix [F_a, F_b] given block by block of rows."""
    similarity, partner = [], []
    best = best_row = torch.empty(0)
    for part in _blocks(n_a, n_b, chunk_bytes):
        values = block(part)  # [block, F_b]
        row = values.max(1)
        similarity.append(row.values)
        partner.append(row.indices)
        column = values.max(0)
        if part.start == 0:
            best, best_row = column.values, column.indices
        else:
            better = column.values > best
            best = torch.where(better, column.values, best)
            best_row = torch.where(better, column.indices + part.start, best_row)
    partners = torch.cat(partner)
    return Match(partners, torch.cat(similarity), best_row[partners] == torch.arange(n_a, device=partners.device))


class ActivationCorrelation:
    """Pearson correlation over tokens between the features of two dictionaries that read the same tokens.

    With sums over N tokens, r_ij = (N Σ f_i g_j − Σ f_i Σ g_j) / sqrt((N Σ f_i² − (Σ f_i)²) (N Σ g_j² − (Σ g_j)²)).
    A feature that never varies has correlation 0 with everything.
    """

    def __init__(self, n_a: int, n_b: int) -> None:
        self.n_tokens = 0
        self.products = torch.zeros(n_a, n_b)  # [F_a, F_b] Σ f_i g_j
        self._sums = (torch.zeros(n_a, dtype=torch.float64), torch.zeros(n_b, dtype=torch.float64))
        self._squares = (torch.zeros(n_a, dtype=torch.float64), torch.zeros(n_b, dtype=torch.float64))

    def update(self, f: Tensor, g: Tensor) -> None:
        """Add tokens. f: [N, F_a]; g: [N, F_b], dense activations of the same N tokens."""
        if len(f) != len(g):
            raise UserError(f"activations of {len(f)} and of {len(g)} tokens: both must be of the same tokens")
        self.n_tokens += len(f)
        self.products += (f.T.float() @ g.float()).cpu()
        for total, squares, values in zip(self._sums, self._squares, (f, g), strict=True):
            total += values.sum(0).cpu().double()
            squares += values.float().square().sum(0).cpu().double()

    def rows(self, part: slice) -> Tensor:
        """Correlations of the features of a in the slice with all of b, [block, F_b] float32."""
        n = self.n_tokens
        (sum_a, sum_b), (square_a, square_b) = self._sums, self._squares
        spread_a = (n * square_a[part] - sum_a[part].square()).clamp(min=0).sqrt()
        spread_b = (n * square_b - sum_b.square()).clamp(min=0).sqrt()
        covariance = n * self.products[part].double() - sum_a[part, None] * sum_b
        scale = spread_a[:, None] * spread_b
        return torch.where(scale > 0, covariance / scale.clamp(min=1e-300), 0.0).float()

    def match(self, *, chunk_bytes: int = CHUNK_BYTES) -> Match:
        """Best partners by correlation."""
        n_a, n_b = self.products.shape
        return _match(self.rows, n_a, n_b, chunk_bytes)


def persistent_features(match: Match, *, threshold: float = 0.7) -> Tensor:
    """Features of a that have a mutual partner in b of at least this similarity: the same feature, one layer on."""
    return (match.mutual & (match.similarity >= threshold)).nonzero()[:, 0]


def split_features(narrow: Tensor, wide: Tensor, *, threshold: float = 0.7) -> dict[int, list[int]]:
    """Features of the narrow dictionary that are nearest to two or more of the wide one: {feature: its parts}.

    narrow: [F_a, d]; wide: [F_b, d]. A wide feature belongs to the narrow one with the largest decoder cosine, if that
    is at least `threshold`.
    """
    match = match_features(wide, narrow)
    parts: dict[int, list[int]] = {}
    for feature in (match.similarity >= threshold).nonzero()[:, 0].tolist():
        parts.setdefault(int(match.partner[feature]), []).append(feature)
    return {whole: sorted(found) for whole, found in sorted(parts.items()) if len(found) > 1}


def _blocks(n_rows: int, n_columns: int, chunk_bytes: int) -> Iterator[slice]:
    step = max(1, chunk_bytes // (4 * max(n_columns, 1)))
    for start in range(0, n_rows, step):
        yield slice(start, min(start + step, n_rows))


def _check_width(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"decoder rows of width {a.shape[-1]} and {b.shape[-1]} cannot be compared: match by activation instead"
        )
