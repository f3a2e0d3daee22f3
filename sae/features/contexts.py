"""Summaries of features: where in the text they fire, on which tokens, and which next tokens they speak for.

1. Run the model over the text once; at each site encode the activations and keep the features asked about.
2. Of each text keep the position where a feature is strongest, with a window around it; of all texts keep n of the
   strongest windows that read differently, as far as there are such with another token at the peak. One text gives one
   window, so ten windows are ten texts.
3. Count how often the feature fires, and on which tokens: by its mean activation on a token's n occurrences, with
   `PRIOR` more on which it would be zero, so that neither the frequent tokens come first nor those seen once.
4. The logit effect of feature i is W_U W_dec[i]: what one unit of it adds to the logits through the unembedding, the
   final norm left out (logit lens, nostalgebraist 2020). It means little at early sites.

Activations are dense only for the features asked about, in chunks of `CHUNK_BYTES`: memory does not grow with the text
but for the list of (feature, token) pairs that occurred.

Shapes: B texts, S positions, N = tokens of a batch, F features, n the features asked about at a site ("slots"),
P windows in the pool, W positions in a window, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae._frames import Result
from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.data.batches import counted_tokens, token_batches
from sae.data.text import TextSource
from sae.errors import UserError, unknown
from sae.features.logits import unembedding
from sae.features.matching import nearest_features
from sae.features.sketches import TokenSums
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes
from sae.sparse.activations import group_sizes
from sae.splice import ensure_checked

if TYPE_CHECKING:
    import pandas as pd

CHUNK_BYTES = 64 * 2**20
POOL_FACTOR = 4
"""Windows kept for each one shown, so that windows with the same words can be dropped."""
NO_TOKEN = -1
PRIOR = 5
"""Occurrences with activation zero that every token is taken to have beside its own."""
SHOWN = 4
"""Tokens of a feature in a table."""


@dataclass(frozen=True)
class Context:
    """A stretch of text on which a feature fires."""

    tokens: list[str]
    """The tokens of the window, readable."""
    activations: list[float]
    """The feature's activation on each of them."""
    peak: int
    """Index in the window of the strongest activation in the text."""

    def text(self) -> str:
        """The window, with the token of the peak in brackets."""
        peak = self.tokens[self.peak]
        marked = peak.replace(peak.strip(), f"[{peak.strip()}]") if peak.strip() else f"[{peak}]"
        words = [*self.tokens[: self.peak], marked, *self.tokens[self.peak + 1 :]]
        return "".join(words).replace("\n", "⏎").strip()


@dataclass(frozen=True)
class FeatureSummary:
    """Activity of one feature on a text, and its effect on logits."""

    site: str
    """Site of the feature."""
    index: int
    """Its index in the dictionary."""
    density: float
    """Share of the tokens on which it is active."""
    max_activation: float
    """Its largest activation."""
    mean_activation: float
    """Its mean activation where it is active; 0 if it never is."""
    contexts: list[Context]
    """Windows around its strongest activations, strongest first, one a text."""
    top_tokens: list[str]
    """Tokens on which its activation is largest on average (Σ f / (n + `PRIOR`)), largest first."""
    top_logits: list[tuple[str, float]]
    """Tokens whose logits one unit of it raises most, with the logit."""
    bottom_logits: list[tuple[str, float]]
    """Tokens whose logits it lowers most."""
    neighbours: list[tuple[int, float]]
    """Features of the same dictionary with the largest decoder cosine."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON-ready values."""
        return asdict(self)


class FeatureSummaries(dict[tuple[Site, int], FeatureSummary], Result):
    """Summaries by (site, index)."""

    def to_frame(self) -> pd.DataFrame:
        """A row a feature; texts are joined, and the token of the peak stands in brackets."""
        import pandas as pd

        rows = [
            {
                "feature": f"{summary.site}/{summary.index}",
                "density": summary.density,
                "max": summary.max_activation,
                "mean": summary.mean_activation,
                "top tokens": " ".join(token.strip() for token in summary.top_tokens[:SHOWN]),
                "raises": " ".join(token.strip() for token, _ in summary.top_logits[:SHOWN]),
                "strongest context": summary.contexts[0].text() if summary.contexts else "",
            }
            for summary in self.values()
        ]
        return pd.DataFrame(rows).set_index("feature") if rows else pd.DataFrame()

    def to_dict(self) -> dict[str, Any]:
        """All summaries as JSON-ready values."""
        return {"schema_version": 1, "features": [summary.to_dict() for summary in self.values()]}


@torch.no_grad()
def top_contexts(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    features: Mapping[Site, Sequence[int]],
    *,
    n: int = 10,
    before: int = 14,
    after: int = 5,
    n_tokens: int = 10,
    n_neighbours: int = 5,
    max_tokens: int | None = 200_000,
    batch_size: int = 32,
    context: int | None = None,
    special_tokens: bool = False,
    progress: Callable[[int], None] | None = None,
) -> FeatureSummaries:
    """Find the texts that chosen features fire on most strongly, in one pass over a text.

    Args:
        model, saes: the model, and autoencoders of it by site.
        texts: documents, a .txt or .jsonl file, or a hub data set.
        features: indices of the features asked about, by site.
        n: windows of a feature, at most one a text.
        before, after: tokens of a window left and right of the strongest one.
        n_tokens: number of top tokens, and of logits raised and lowered most.
        n_neighbours: features of the same dictionary with the largest decoder cosine.
        max_tokens, batch_size, context, special_tokens, progress: as in `evaluate_saes`.

    Returns:
        A summary of each feature.

    Raises:
        UserError: a site or feature does not exist, or an autoencoder does not fit the model.
    """
    _check(model, saes, features)
    sizes = {"n": n, "before": before, "after": after, "vocab_size": model.vocab_size}
    asked = {site: sorted(set(indices)) for site, indices in sorted(features.items()) if len(indices)}
    watched = {site: _SiteWindows(saes, site, indices, **sizes) for site, indices in asked.items()}
    reads = as_saes(saes).read_sites(watched)
    limits: dict[str, Any] = {"max_tokens": max_tokens, "batch_size": batch_size, "context": context}
    for tokens in token_batches(model, texts, **limits):
        tokens = tokens.to(model.device)
        counted = counted_tokens(model, tokens, special_tokens=special_tokens)
        run = model.run(tokens, capture=reads.values(), need_logits=False)
        for site, windows in watched.items():
            windows.update(run.activations[reads[site]], tokens, counted)
        if progress is not None:
            progress(int(tokens.lengths.sum()))
    summaries = (windows.summaries(model, n_tokens=n_tokens, n_neighbours=n_neighbours) for windows in watched.values())
    return FeatureSummaries({(Site.parse(one.site), one.index): one for site in summaries for one in site})


def _check(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], features: Mapping[Site, Sequence[int]]
) -> None:
    saes = as_saes(saes)
    for site, indices in features.items():
        if site not in saes:
            raise unknown("site", str(site), list(map(str, saes)))
        n_features = saes.config(site).n_features
        wrong = next((i for i in indices if not 0 <= i < n_features), None)
        if wrong is not None:
            raise UserError(f"unknown feature '{site}/{wrong}': allowed are 0 to {n_features - 1}")
    ensure_checked(model, saes)


def logit_effect(model: LanguageModel, W_dec: Tensor, *, k: int) -> tuple[list[list[tuple[str, float]]], ...]:
    """Tokens whose logits decoder rows [n, d] raise most and lower most: two lists [n][k] of (token, logit)."""
    W_U = unembedding(model)
    if W_U is None or W_U.shape[-1] != W_dec.shape[-1]:
        empty: list[list[tuple[str, float]]] = [[] for _ in W_dec]
        return empty, empty
    weight = W_U.float()  # [V, d]
    k = min(k, len(weight))
    top: list[list[tuple[str, float]]] = []
    bottom: list[list[tuple[str, float]]] = []
    for rows in W_dec.to(weight).split(max(1, CHUNK_BYTES // (4 * len(weight)))):
        logits = rows @ weight.T  # [block, V]
        for tokens, largest in ((top, True), (bottom, False)):
            values, ids = logits.topk(k, dim=-1, largest=largest)
            for row_values, row_ids in zip(values.tolist(), ids, strict=True):
                tokens.append(list(zip(model.token_strings(row_ids), row_values, strict=True)))
    return top, bottom


class _SiteWindows:
    """The running state for the features asked about at one site."""

    def __init__(
        self, saes: Mapping[Site, SparseAutoencoder], site: Site, indices: list[int],
        *, n: int, before: int, after: int, vocab_size: int,
    ) -> None:  # fmt: skip
        self.saes, self.site, self.indices, self.n, self.before = saes, site, indices, n, before
        slots, pool, width = len(indices), POOL_FACTOR * max(n, 1), before + 1 + after  # one tells the peak
        sae = saes[site]
        competing = sae.nonlinearity.needs_k
        self.alone = None if competing else sae.restrict(torch.tensor(indices))
        n_encoded = sae.config.n_features if competing else slots
        self.slot_of = torch.full((n_encoded,), -1, dtype=torch.int64, device=sae.device)
        self.slot_of[torch.tensor(indices if competing else range(slots))] = torch.arange(slots, device=sae.device)
        self.n_tokens = 0
        self.count = torch.zeros(slots, dtype=torch.int64)
        self.total = torch.zeros(slots, dtype=torch.float64)
        self.peak = torch.zeros(slots, pool)  # [n, P] activation at the peak, 0 where the pool has none yet
        self.window_ids = torch.full((slots, pool, width), NO_TOKEN, dtype=torch.int32)
        self.window_values = torch.zeros(slots, pool, width)
        self.tokens = TokenSums(slots, vocab_size)
        self.occurrences = torch.zeros(vocab_size, dtype=torch.int64)

    def update(self, x: Tensor, tokens: Tokens, counted: Tensor) -> None:
        """Add a batch. x: [B, S, r], what the dictionary reads; counted: [B, S] bool, the tokens that count."""
        row, position = counted.nonzero(as_tuple=True)  # [N] each
        encoder = self.saes[self.site] if self.alone is None else self.alone
        active = self._asked_about(encoder.encode_sparse(x[row, position]))
        row, position = row[active.token], position[active.token]
        self.n_tokens += int(counted.sum())
        self.occurrences += tokens.input_ids[counted].cpu().bincount(minlength=len(self.occurrences))
        self.count += group_sizes(active.feature, len(self.indices)).cpu()
        self.total.index_add_(0, active.feature.cpu(), active.value.cpu().double())
        self.tokens.add(active.feature.cpu(), tokens.input_ids[row, position].cpu(), active.value.cpu())

        ids = torch.where(tokens.attention_mask.bool(), tokens.input_ids, NO_TOKEN).int().cpu()
        step = max(1, CHUNK_BYTES // (4 * counted.numel()))
        for start in range(0, len(self.indices), step):
            inside = (active.feature >= start) & (active.feature < start + step)
            size = min(step, len(self.indices) - start)
            f = torch.zeros(size, *counted.shape, device=x.device)  # [n, B, S]
            f[active.feature[inside] - start, row[inside], position[inside]] = active.value[inside].float()
            self._merge(slice(start, start + size), f.cpu(), ids)

    def _asked_about(self, features: SparseFeatures) -> SparseFeatures:
        """Only the features asked about, by slot instead of index."""
        slot = self.slot_of[features.feature]
        asked = slot >= 0
        return SparseFeatures(features.token[asked], slot[asked], features.value[asked])

    def _merge(self, slots: slice, f: Tensor, ids: Tensor) -> None:
        """Keep the strongest windows of the pool and of this batch. f: [n, B, S]; ids: [B, S]."""
        pool = self.peak.shape[1]
        strongest, position = f.max(-1)  # [n, B] each: the one window of each text
        peak, choice = torch.cat([self.peak[slots], strongest], 1).sort(dim=1, descending=True, stable=True)
        peak, choice = peak[:, :pool], choice[:, :pool]  # [n, P] of P + B; of equal windows the first one read
        slot, rank = (choice >= pool).logical_and(peak > 0).nonzero(as_tuple=True)  # of the new windows in the pool
        text = choice[slot, rank] - pool
        old = choice.clamp(max=pool - 1)[..., None].expand(-1, -1, self.window_ids.shape[-1])
        window_ids, window_values = self.window_ids[slots].gather(1, old), self.window_values[slots].gather(1, old)

        offset = torch.arange(self.window_ids.shape[-1]) - self.before
        column = position[slot, text][:, None] + offset  # [new, W]
        inside = (column >= 0) & (column < f.shape[-1])
        column = column.clamp(0, f.shape[-1] - 1)
        window_ids[slot, rank] = torch.where(inside, ids[text[:, None], column], NO_TOKEN)
        window_values[slot, rank] = torch.where(inside, f[slot[:, None], text[:, None], column], 0.0)
        self.peak[slots], self.window_ids[slots], self.window_values[slots] = peak, window_ids, window_values

    def summaries(self, model: LanguageModel, *, n_tokens: int, n_neighbours: int) -> list[FeatureSummary]:
        """One summary a feature."""
        W_dec = self.saes[self.site].W_dec
        index = torch.tensor(self.indices, device=W_dec.device)
        top, bottom = logit_effect(model, W_dec[index], k=n_tokens)
        cosine, neighbour = nearest_features(W_dec, index, k=n_neighbours)
        top_ids = self.tokens.top(n_tokens, self.occurrences, PRIOR)
        return [
            FeatureSummary(
                site=self.site.name,
                index=feature,
                density=int(self.count[slot]) / max(self.n_tokens, 1),
                max_activation=float(self.peak[slot].max()),
                mean_activation=float(self.total[slot]) / max(int(self.count[slot]), 1),
                contexts=self._contexts(model, slot),
                top_tokens=model.token_strings(top_ids[slot]),
                top_logits=top[slot],
                bottom_logits=bottom[slot],
                neighbours=list(zip(neighbour[slot].tolist(), cosine[slot].tolist(), strict=True)),
            )
            for slot, feature in enumerate(self.indices)
        ]

    def _contexts(self, model: LanguageModel, slot: int) -> list[Context]:
        """n windows of a slot that read differently, strongest first: one a peak token, others after that."""
        ranks: dict[tuple[int, ...], int] = {}  # of the strongest window with these words
        for rank in range(int((self.peak[slot] > 0).sum())):
            ids = self.window_ids[slot, rank]
            ranks.setdefault(tuple(ids[ids != NO_TOKEN].tolist()), rank)
        first_of_peak: dict[int, int] = {}
        for rank in ranks.values():
            first_of_peak.setdefault(int(self.window_ids[slot, rank, self.before]), rank)
        others = [rank for rank in ranks.values() if rank not in first_of_peak.values()]
        return [self._context(model, slot, rank) for rank in sorted([*first_of_peak.values(), *others][: self.n])]

    def _context(self, model: LanguageModel, slot: int, rank: int) -> Context:
        real = self.window_ids[slot, rank] != NO_TOKEN
        ids, values = self.window_ids[slot, rank][real], self.window_values[slot, rank][real]
        return Context(model.token_strings(ids), values.tolist(), int(real[: self.before].sum()))
