"""Feature pages: everything that is shown of a feature, from one pass over a text.

1. Count and sample while the text streams by (`sae.features.tally`): how often the feature is on and how strongly, its
   strongest contexts, contexts drawn at random from intervals of activation and from all of the text.
2. Site by site, run the contexts that are shown once more with the feature ablated (`sae.features.ablated`).
3. From the weights alone: the direct effect on all logits (`sae.features.logits`) and the features that write alike
   (decoder cosine); from the pass: those that are on at the same tokens (Pearson correlation).

The panels are those of Towards Monosemanticity (Bricken et al. 2023). With `partial` the state of the pass is written
to disk every minute, and a pass that was interrupted goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae._files import read_tensors, write_tensors
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import token_batches
from sae.data.text import TextSource
from sae.errors import UserError, unknown
from sae.features.ablated import Row, measure_rows
from sae.features.contexts import PRIOR
from sae.features.logits import direct_effects
from sae.features.matching import nearest_features
from sae.features.options import FeaturePageOptions
from sae.features.page import AblatedContext, FeaturePage, FeaturePages, IntervalSample
from sae.features.sketches import BINS, LEVELS
from sae.features.tally import SiteTally, TextPass, near_sites
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes
from sae.splice import ensure_checked

QUANTILES = (0.5, 0.9, 0.99)
HISTOGRAM_BINS = 40
BATCH_TEXTS = 512
"""Texts that are read together and sorted by length."""
STATE_FILE = "state.safetensors"
SAVE_EVERY = 60.0
"""Seconds between two states on disk."""


def feature_pages(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    features: Mapping[Site, Sequence[int]] | None = None,
    options: FeaturePageOptions | None = None,
    *,
    context: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> FeaturePages:
    """Make the pages of features: when they are on, in which contexts, and what they do there.

    Args:
        model, saes: the model, and SAEs of it by site.
        texts: documents, a .txt or .jsonl file, or a hub data set.
        features: indices of the features asked about, by site; all by default.
        options: how much is read and shown.
        context: longest context in tokens, 128 by default or less where the model takes less.
        progress: called with the number of tokens of every batch.

    Returns:
        The pages by name, `resid_3/120`, sites in forward order.

    Raises:
        UserError: a site or feature does not exist, an SAE does not fit the model, or the text is empty.
    """
    sites = feature_pages_by_site(model, saes, texts, features, options, context=context, progress=progress)
    return FeaturePages({page.name: page for _, pages in sites for page in pages})


def feature_pages_by_site(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    features: Mapping[Site, Sequence[int]] | None = None,
    options: FeaturePageOptions | None = None,
    *,
    context: int | None = None,
    progress: Callable[[int], None] | None = None,
    partial: Path | None = None,
    finished: Iterable[Site] = (),
) -> Iterator[tuple[Site, list[FeaturePage]]]:
    """`feature_pages` site by site, so that no more than the pages of one are in memory.

    partial: folder where the state of the pass is kept and taken up again; finished: sites that are left out then.
    """
    options = options or FeaturePageOptions()
    asked = _asked(model, saes, features)
    text_pass = TextPass(model, saes, asked, options)
    state = None if partial is None else partial / STATE_FILE
    if state is not None and state.is_file():
        text_pass.restore(read_tensors(state))
    batches = token_batches(model, texts, max_tokens=options.tokens, batch_size=BATCH_TEXTS, context=context)
    if progress is not None and text_pass.n_tokens:
        progress(text_pass.n_tokens)
    saved = time.monotonic()
    for tokens in islice(batches, text_pass.batches, None):
        text_pass.update(tokens.to(model.device))
        if progress is not None:
            progress(int(tokens.lengths.sum()))
        if state is not None and time.monotonic() - saved > SAVE_EVERY:
            write_tensors(state, text_pass.state())
            saved = time.monotonic()
    if not text_pass.n_counted:
        raise UserError("no tokens to describe features on: the text is empty")
    text_pass.forget()
    if state is not None:
        write_tensors(state, text_pass.state())
    for site, tally in text_pass.tallies.items():
        if site not in set(finished):
            yield site, _SitePages(text_pass, tally).pages()


def _asked(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], features: Mapping[Site, Sequence[int]] | None
) -> dict[Site, list[int]]:
    """The features asked about, in order."""
    saes = as_saes(saes)
    asked = {site: range(saes.config(site).n_features) for site in saes} if features is None else features
    for site, indices in asked.items():
        if site not in saes:
            raise unknown("site", str(site), list(map(str, saes)))
        n_features = saes.config(site).n_features
        if wrong := [i for i in indices if not 0 <= i < n_features]:
            raise UserError(f"unknown feature '{site}/{wrong[0]}': allowed are 0 to {n_features - 1}")
    if not any(len(indices) for indices in asked.values()):
        raise UserError("no features asked about: name one at least")
    ensure_checked(model, saes)
    return {site: sorted(set(indices)) for site, indices in sorted(asked.items()) if len(indices)}


class _SitePages:
    """The pages of one site's features, once the text has been read."""

    def __init__(self, text_pass: TextPass, tally: SiteTally) -> None:
        self.read, self.tally, self.options = text_pass, tally, text_pass.options
        self.model, self.sae = text_pass.model, text_pass.saes[tally.site]
        self.texts = text_pass.texts
        self.strings: dict[int, str] = {}

    def pages(self) -> list[FeaturePage]:
        """One page a feature."""
        slots = range(len(self.tally.features))
        strongest = [self._distinct(self.tally.strongest.of(slot)) for slot in slots]
        levels = [self._intervals(slot) for slot in slots]
        drawn = [[self.tally.samples.of_levels(slot, part) for part in levels[slot]] for slot in slots]
        random = self.read.random.of_levels(0, slice(0, LEVELS))
        shown = [[*strongest[slot], *chain.from_iterable(drawn[slot]), *random] for slot in slots]
        self._name_tokens(shown)
        wanted = [Row(slot, text, self._end(text, position)) for slot in slots for text, position in shown[slot]]
        measured = measure_rows(self.model, self.tally.site, self.sae, self.tally.features, self.texts, wanted)

        def contexts(slot: int, occurrences: Iterable[tuple[int, int]]) -> list[AblatedContext]:
            return [self._context(measured, slot, *occurrence) for occurrence in occurrences]

        index = torch.tensor(self.tally.features, device=self.sae.device)
        effects = direct_effects(self.model, self.sae.W_dec[index], k=self.options.listed)
        top_tokens = self.tally.tokens.top(self.options.listed, self.read.occurrences, PRIOR)
        by_decoder, by_activation = self._by_decoder(index), self._by_activation()
        prefix = f"{self.tally.site}/"
        pages = []
        for slot in slots:
            similar = {"decoder": by_decoder[slot], "activation": by_activation[slot]}
            same = [(name, value) for name, value in by_decoder[slot] if name.startswith(prefix)]
            pages.append(
                FeaturePage(
                    **self._numbers(slot),
                    contexts=list(contexts(slot, strongest[slot])),
                    top_tokens=self.model.token_strings(top_tokens[slot]),
                    **{"top_logits": [], "bottom_logits": [], "logit_histogram": {}, **effects[slot]},
                    neighbours=[(int(name.removeprefix(prefix)), value) for name, value in same],
                    samples=[
                        self._interval(slot, part, contexts(slot, occurrences))
                        for part, occurrences in zip(levels[slot], drawn[slot], strict=True)
                    ][::-1],
                    random=contexts(slot, random),
                    similar=similar,
                )
            )
        return pages

    def _numbers(self, slot: int) -> dict[str, Any]:
        """The counts of a feature."""
        tally, histogram = self.tally, self.tally.histogram
        used, count = histogram.used(slot), int(tally.count[slot])
        step = -(-used // HISTOGRAM_BINS) or 1
        counts = torch.nn.functional.pad(histogram.counts[slot], (0, step * HISTOGRAM_BINS))
        n_bins = -(-used // step)
        low, high = (float(edge) for edge in histogram.edges(slot)[:2])
        return {
            "site": tally.site.name,
            "index": tally.features[slot],
            "density": count / max(tally.n_tokens, 1),
            "max_activation": float(tally.largest[slot]),
            "mean_activation": float(tally.total[slot]) / max(count, 1),
            "n_tokens": tally.n_tokens,
            "quantiles": [(share, _short(histogram.quantile(slot, share))) for share in QUANTILES] if used else [],
            "histogram": {
                "edges": [_short((high - low) * step * n) for n in range(n_bins + 1)] if used else [],
                "counts": counts[: step * n_bins].reshape(n_bins, step).sum(1).tolist() if used else [],
            },
        }

    def _intervals(self, slot: int) -> list[slice]:
        """The levels of each interval, as nearly equal in number as whole levels can be."""
        used = -(-self.tally.histogram.used(slot) // (BINS // LEVELS))
        n = min(self.options.intervals, used)
        bounds = [round(used * part / n) for part in range(n + 1)] if n else []
        return [slice(low, high) for low, high in pairwise(bounds)]

    def _interval(self, slot: int, levels: slice, contexts: list[AblatedContext]) -> IntervalSample:
        width = BINS // LEVELS
        bins = slice(levels.start * width, levels.stop * width)
        edges, counts = self.tally.histogram.edges(slot), self.tally.histogram.counts[slot]
        high = min(float(edges[bins.stop]), float(self.tally.largest[slot]))
        share = int(counts[bins].sum()) / max(self.tally.n_tokens, 1)
        return IntervalSample(_short(float(edges[bins.start])), _short(high), share, contexts)

    def _by_decoder(self, index: Tensor) -> list[list[tuple[str, float]]]:
        """For each feature the features of the same and the neighbouring layers with the largest decoder cosine."""
        saes, k = as_saes(self.read.saes), self.options.listed
        near = [
            site for site in near_sites(saes, self.tally.site) if saes[site].W_dec.shape[1] == self.sae.W_dec.shape[1]
        ]
        similar: list[list[tuple[str, float]]] = [[] for _ in self.tally.features]
        for site in near:
            among = None if site == self.tally.site else saes[site].W_dec
            values, features = nearest_features(
                self.sae.W_dec, index, among=among, k=min(k, saes.config(site).n_features)
            )
            for slot, (row, of_row) in enumerate(zip(features.tolist(), values.tolist(), strict=True)):
                similar[slot] += [(f"{site}/{feature}", _short(v)) for feature, v in zip(row, of_row, strict=True)]
        return [sorted(rows, key=lambda row: -row[1])[:k] for rows in similar]

    def _by_activation(self) -> list[list[tuple[str, float]]]:
        """For each feature those whose activations correlate most with its own."""
        tally, k = self.tally, self.options.listed
        similar: list[list[tuple[str, float]]] = [[] for _ in tally.features]
        if not tally.others or not tally.correlation.n_tokens:
            return similar
        correlation = tally.correlation.rows(slice(0, len(similar)))  # [n, features of all these sites]
        first = tally.offsets[tally.others.index(tally.site)]
        correlation[torch.arange(len(similar)), first + torch.tensor(tally.features)] = -torch.inf
        offsets = torch.tensor(tally.offsets)
        values, columns = correlation.topk(min(k, correlation.shape[1]), dim=-1)
        sites = torch.searchsorted(offsets, columns, right=True) - 1
        for slot, row in enumerate(zip(values.tolist(), columns.tolist(), sites.tolist(), strict=True)):
            similar[slot] = [
                (f"{tally.others[site]}/{column - tally.offsets[site]}", _short(value))
                for value, column, site in zip(*row, strict=True)
                if value > 0
            ]
        return similar

    # --- contexts -------------------------------------------------------------------------------------------------

    def _end(self, text: int, position: int) -> int:
        return min(len(self.texts[text]), position + self.options.after + 1)

    def _window(self, text: int, position: int) -> slice:
        return slice(max(0, position - self.options.before), self._end(text, position))

    def _distinct(self, occurrences: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """The first n whose windows read differently, strongest first."""
        first: dict[tuple[int, ...], tuple[int, int]] = {}
        for text, position in occurrences:
            first.setdefault(tuple(self.texts[text][self._window(text, position)].tolist()), (text, position))
        return list(first.values())[: self.options.contexts]

    def _name_tokens(self, shown: Iterable[Iterable[tuple[int, int]]]) -> None:
        """Looks up the text of every token that is shown, once."""
        ids = {id for row in shown for occurrence in row for id in self.texts[occurrence[0]].tolist()}
        unknown_ids = sorted(ids - self.strings.keys())
        self.strings |= dict(zip(unknown_ids, self.model.token_strings(unknown_ids), strict=True))

    def _context(
        self, measured: Mapping[Row, tuple[Tensor, Tensor]], slot: int, text: int, position: int
    ) -> AblatedContext:
        window = self._window(text, position)
        f, change = measured[Row(slot, text, self._end(text, position))]
        return AblatedContext(
            tokens=[self.strings[id] for id in self.texts[text][window].tolist()],
            activations=[_short(value) for value in f[window].tolist()],
            peak=position - window.start,
            change=[None if value != value else _short(value, 5) for value in change[window].tolist()],
        )


def _short(value: float, digits: int = 8) -> float:
    """Four figures, and no more than so many places: what a page shows."""
    return round(float(f"{value:.4g}"), digits)
