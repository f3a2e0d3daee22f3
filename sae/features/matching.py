"""Matching the features of two dictionaries: by direction, and by when they fire.

1. `nearest_features`: the features whose decoder rows point most nearly the same way (cosine), of one dictionary or of
   another one (another layer, width or seed).
2. `match_features`: for every feature of a, its best partner in b by decoder cosine, and whether the choice is mutual.
   The mean of the best cosines is the mean max cosine similarity of Sharkey et al. 2022.
3. `match_by_activation`: the same by the Pearson correlation of activations over the tokens of a text, for dictionaries
   whose directions cannot be compared (different sites) or need not agree (several pieces of one).
4. `persistent_features` and `split_features` read a match: what stays between layers, what a wider dictionary splits.

Cosines are computed in blocks of rows that fit in `chunk_bytes`; only the correlation keeps an [F_a, F_b] matrix.

Shapes: F_a and F_b features of dictionaries a and b, n the features asked about, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor
from torch.nn.functional import normalize

from sae._frames import Result
from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.data.batches import counted_tokens, token_batches
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.sparse.activations import group_offsets, row_blocks, weighted_segment_sum

if TYPE_CHECKING:
    import pandas as pd

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Match(Result):
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

    def to_frame(self) -> pd.DataFrame:
        """A row a feature of a: its partner in b, their similarity and whether it is mutual."""
        import pandas as pd

        return pd.DataFrame(self.to_dict()).rename_axis("feature")

    def to_dict(self) -> dict[str, Any]:
        """Three lists, an entry a feature of a."""
        return {name: x.tolist() for name, x in vars(self).items()}

    def text(self) -> str:
        """A line: how similar partners are on average, and how many features have a mutual one."""
        mutual = float(self.mutual.double().mean())
        return f"{len(self.partner):,} features, mean similarity {self.mean:.3f}, {mutual:.3f} with a mutual partner"


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
    nearest = []
    for block in row_blocks(len(rows), 4 * len(columns), chunk_bytes):
        cosine = rows[block] @ columns.T  # [block, F_b]
        if among is None:
            cosine.scatter_(1, features[block, None], -torch.inf)
        nearest.append(cosine.topk(k, dim=-1))
    if not nearest:
        return rows.new_zeros(0, k), features.new_zeros(0, k)
    return torch.cat([top.values for top in nearest]), torch.cat([top.indices for top in nearest])


def match_features(a: Tensor, b: Tensor, *, chunk_bytes: int = CHUNK_BYTES) -> Match:
    """Match features by the cosine of decoder rows (Sharkey et al. 2022: `Match.mean` is their mean max cosine).

    Args:
        a, b: decoder rows [F_a, d] and [F_b, d], such as `sae.W_dec`.
        chunk_bytes: largest block of cosines in memory.

    Returns:
        For each feature of a its most similar feature of b.

    Raises:
        UserError: the rows differ in width.
    """
    _check_width(a, b)
    rows, columns = normalize(a.float(), dim=-1), normalize(b.float(), dim=-1)
    return _match(lambda part: rows[part] @ columns.T, len(a), len(b), chunk_bytes)


def _match(block: Callable[[slice], Tensor], n_a: int, n_b: int, chunk_bytes: int) -> Match:
    """Row and column maxima of a similarity matrix [F_a, F_b] given block by block of rows."""
    similarity, partner = [], []
    best = best_row = torch.empty(0)
    for part in row_blocks(n_a, 4 * n_b, chunk_bytes):
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
    A feature that never varies has correlation 0 with everything. Holds one [F_a, F_b] matrix of float32.
    """

    def __init__(self, n_a: int, n_b: int, *, device: torch.device | str = "cpu") -> None:
        self.n_tokens = 0
        self.products = torch.zeros(n_a, n_b, device=device)  # [F_a, F_b] Σ f_i g_j
        self._a, self._b = _Moments(n_a), _Moments(n_b)

    def update(self, f: SparseFeatures, g: SparseFeatures, n_tokens: int) -> None:
        """Add the nonzero activations of the same `n_tokens` tokens in a and in b."""
        self.n_tokens += n_tokens
        self._a.add(f)
        self._b.add(g)
        if self.products.is_cpu:
            self._add_on_cpu(f, g, n_tokens)
            return
        n_a, n_b = self.products.shape
        by_feature = f.feature.argsort(stable=True)
        step = max(1, CHUNK_BYTES // (4 * n_b))
        for start in range(0, n_tokens, step):
            inside = (g.token >= start) & (g.token < start + step)
            dense = torch.zeros(min(step, n_tokens - start), n_b, device=g.value.device)  # [tokens, F_b]
            dense[g.token[inside] - start, g.feature[inside]] = g.value[inside].float()
            chosen = by_feature[(f.token[by_feature] >= start) & (f.token[by_feature] < start + step)]
            offsets = group_offsets(f.feature[chosen], n_a)
            self.products += weighted_segment_sum(dense, f.token[chosen] - start, offsets, f.value[chosen].float())

    def _add_on_cpu(self, f: SparseFeatures, g: SparseFeatures, n_tokens: int) -> None:
        """The same sums as a product of two sparse matrices, for which nothing of the size [tokens, F_b] is made."""
        n_a, n_b = self.products.shape
        fs = csr_array((f.value.float().numpy(), (f.feature.numpy(), f.token.numpy())), shape=(n_a, n_tokens))
        gs = csr_array((g.value.float().numpy(), (g.token.numpy(), g.feature.numpy())), shape=(n_tokens, n_b))
        added = (fs @ gs).tocoo()
        index = torch.from_numpy(added.row.astype(np.int64) * n_b + added.col)
        self.products.view(-1).index_add_(0, index, torch.from_numpy(added.data))

    def state(self) -> dict[str, Tensor]:
        """The sums as tensors."""
        sums = {"n_tokens": torch.tensor(self.n_tokens), "products": self.products}
        for name, moments in (("a", self._a), ("b", self._b)):
            sums |= {f"{name}.total": moments.total, f"{name}.squares": moments.squares}
        return sums

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self.n_tokens, self.products = int(state["n_tokens"]), state["products"]
        for name, moments in (("a", self._a), ("b", self._b)):
            moments.total, moments.squares = state[f"{name}.total"], state[f"{name}.squares"]

    def rows(self, part: slice) -> Tensor:
        """Correlations of the features of a in the slice with all of b, [block, F_b] float32."""
        spread = self._a.spread(self.n_tokens)[part, None] * self._b.spread(self.n_tokens)  # [block, F_b]
        covariance = self.n_tokens * self.products[part].cpu().double() - self._a.total[part, None] * self._b.total
        return torch.where(spread > 0, covariance / spread.clamp(min=1e-300), 0.0).float()

    def match(self, *, chunk_bytes: int = CHUNK_BYTES) -> Match:
        """Best partners by correlation."""
        n_a, n_b = self.products.shape
        return _match(self.rows, n_a, n_b, chunk_bytes)


class _Moments:
    """Σ f and Σ f² per feature."""

    def __init__(self, n_features: int) -> None:
        self.total = torch.zeros(n_features, dtype=torch.float64)
        self.squares = torch.zeros(n_features, dtype=torch.float64)

    def add(self, features: SparseFeatures) -> None:
        index, value = features.feature.cpu(), features.value.cpu().double()
        self.total.index_add_(0, index, value)
        self.squares.index_add_(0, index, value.square())

    def spread(self, n_tokens: int) -> Tensor:
        """[F] sqrt(N Σ f² − (Σ f)²); 0 where that is rounding."""
        variance = n_tokens * self.squares - self.total.square()
        return torch.where(variance > 1e-12 * n_tokens * self.squares, variance, 0.0).sqrt()


@torch.no_grad()
def match_by_activation(
    model: LanguageModel,
    a: tuple[Site, SparseAutoencoder],
    b: tuple[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    *,
    max_tokens: int | None = 50_000,
    batch_size: int = 32,
    context: int | None = None,
    special_tokens: bool = False,
) -> Match:
    """Match features by the Pearson correlation of their activations over the tokens of a text.

    Args:
        model: the model that both dictionaries read.
        a, b: (site, autoencoder) each; the same site (two widths or seeds) or different ones (two layers).
        texts: documents, a .txt or .jsonl file, or a hub data set.
        max_tokens, batch_size, context, special_tokens: as in `evaluate_saes`.

    Returns:
        For each feature of a its most similar feature of b.

    Raises:
        UserError: the text is empty.
    """
    (site_a, sae_a), (site_b, sae_b) = a, b
    read_a, read_b = sae_a.config.read_site(site_a), sae_b.config.read_site(site_b)
    sums = ActivationCorrelation(sae_a.config.n_features, sae_b.config.n_features, device=model.device)
    for tokens in token_batches(model, texts, max_tokens=max_tokens, batch_size=batch_size, context=context):
        tokens = tokens.to(model.device)
        counted = counted_tokens(model, tokens, special_tokens=special_tokens)
        run = model.run(tokens, capture={read_a, read_b}, need_logits=False)
        f = sae_a.encode_sparse(run.activations[read_a][counted])
        g = sae_b.encode_sparse(run.activations[read_b][counted])
        sums.update(f, g, int(counted.sum()))
    if not sums.n_tokens:
        raise UserError("no tokens to match features on: the text is empty")
    return sums.match()


def persistent_features(match: Match, *, threshold: float = 0.7) -> Tensor:
    """Features of a that have a mutual partner in b of at least this similarity: the same feature, one layer on."""
    return (match.mutual & (match.similarity >= threshold)).nonzero()[:, 0]


def split_features(narrow: Tensor, wide: Tensor, *, threshold: float = 0.7) -> dict[int, list[int]]:
    """Features of the narrow dictionary that are nearest to two or more of the wide one: {feature: its pieces}.

    narrow: [F_a, d]; wide: [F_b, d]. A wide feature belongs to the narrow one with the largest decoder cosine, if that
    is at least `threshold`.
    """
    match = match_features(wide, narrow)
    wide_of: dict[int, list[int]] = {}
    for feature in (match.similarity >= threshold).nonzero()[:, 0].tolist():
        wide_of.setdefault(int(match.partner[feature]), []).append(feature)
    return {feature: sorted(pieces) for feature, pieces in sorted(wide_of.items()) if len(pieces) > 1}


def _check_width(a: Tensor, b: Tensor) -> None:
    if a.shape[-1] != b.shape[-1]:
        raise UserError(
            f"decoder rows of width {a.shape[-1]} and {b.shape[-1]} cannot be compared: match by activation instead"
        )
