"""One pass over a text that counts and samples the activations of chosen features.

1. Run the model on a batch of texts; at each site encode the tokens that count and keep the features asked about.
2. Add them to the sketches of the site (`sae.features.sketches`), and for the first `correlation_tokens` tokens to the
   correlations with all features of the same and the neighbouring layers (`ActivationCorrelation`).
3. Texts that a sketch refers to are kept as token ids, all others forgotten: memory is bounded by what is shown.

Random draws depend on the seed, the site and the number of the forward pass alone: reading that was interrupted goes on
from the state on disk and ends as it would have.

Shapes: B texts, S positions, n slots (features asked about at a site), k nonzero activations of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.data.batches import counted_tokens
from sae.features.matching import ActivationCorrelation
from sae.features.options import FeaturePageOptions
from sae.features.sketches import (
    BINS,
    LEVELS,
    ActivationHistogram,
    IntervalSamples,
    StrongestContexts,
    TokenSums,
)
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.saes import SAEs, as_saes
from sae.sparse.activations import group_sizes

SPARE = 3
"""Strongest contexts kept for each one shown, so that windows with the same words can be dropped."""
CORRELATION_BYTES = 512 * 2**20
"""Largest table of correlations of a site; the sites farthest from it are left out of a larger one."""
PASS_TOKENS = 8192
CAPTURE_BYTES = 256 * 2**20
"""Activations of all sites in one forward pass."""
NUMBERS = ("batches", "passes", "n_texts", "n_tokens", "n_counted")
FORGET_EVERY = 8
"""Batches after which texts that nothing refers to are forgotten."""


class SiteTally:
    """Running counts of one site's features."""

    def __init__(
        self, saes: SAEs, site: Site, features: Sequence[int], options: FeaturePageOptions, vocab_size: int
    ) -> None:
        n = len(features)
        self.site, self.features, self.n_tokens = site, list(features), 0
        self.count = torch.zeros(n, dtype=torch.int64)
        self.total = torch.zeros(n, dtype=torch.float64)
        self.largest = torch.zeros(n)
        self.histogram = ActivationHistogram(n)
        self.samples = IntervalSamples(n, options.samples)
        self.strongest = StrongestContexts(n, SPARE * options.contexts)
        self.tokens = TokenSums(n, vocab_size)
        self.slot_of = torch.full((saes.config(site).n_features,), -1, dtype=torch.int64)
        self.slot_of[torch.tensor(self.features)] = torch.arange(n)
        self.others = _correlated(saes, site, n) if options.correlation_tokens else []
        widths = [saes.config(other).n_features for other in self.others]
        self.offsets = [0, *accumulate(widths)]
        """Where the features of each other site begin among those that are correlated with."""
        self.correlation = ActivationCorrelation(n, self.offsets[-1])

    def update(
        self, f: SparseFeatures, rows: Tensor, positions: Tensor, ids: Tensor, *, numbers: Tensor,
        generator: torch.Generator,
    ) -> None:  # fmt: skip
        """Adds a forward pass. f: features by slot at tokens [N]; rows, positions, ids: [N] of these tokens; numbers:
        [B] of the texts.
        """
        self.n_tokens += len(rows)
        slot, value = f.feature, f.value.float()
        row, position, token = rows[f.token], positions[f.token], ids[f.token]
        self.count += group_sizes(slot, len(self.features))
        self.total.index_add_(0, slot, value.double())
        self.largest.scatter_reduce_(0, slot, value, "amax")
        above = value > 0
        if not bool(above.all()):
            slot, value, row, position, token = (x[above] for x in (slot, value, row, position, token))
        self.tokens.add(slot, token, value)
        self.samples.widen(self.histogram.widen(slot, value))
        bins = self.histogram.bins(slot, value)
        self.histogram.add(slot, bins)
        self.samples.add(slot, bins // (BINS // LEVELS), numbers[row], position, generator)
        best = self._strongest_of_each_text(slot, value, row, len(numbers))
        self.strongest.add(slot[best], value[best], token[best], numbers[row[best]], position[best])

    def _strongest_of_each_text(self, slot: Tensor, value: Tensor, row: Tensor, n_texts: int) -> Tensor:
        """The entries that are the largest of their slot and text, the first of equal ones."""
        key = slot * n_texts + row
        peak = torch.zeros(len(self.features) * n_texts).scatter_reduce_(0, key, value, "amax")
        entry = (value == peak[key]).nonzero()[:, 0]
        first = torch.full((len(peak),), len(value)).scatter_reduce_(0, key[entry], entry, "amin")
        return entry[first[key[entry]] == entry]

    @property
    def sketches(self) -> dict[str, ActivationHistogram | IntervalSamples | StrongestContexts | TokenSums]:
        """By name."""
        return {name: getattr(self, name) for name in ("histogram", "samples", "strongest", "tokens")}

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors."""
        tensors = {"count": self.count, "total": self.total, "largest": self.largest}
        tensors["n_tokens"] = torch.tensor(self.n_tokens)
        for name, sketch in self.sketches.items():
            tensors |= {f"{name}/{key}": x for key, x in sketch.state().items()}
        return tensors | {f"correlation/{key}": x for key, x in self.correlation.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        self.count, self.total, self.largest = state["count"], state["total"], state["largest"]
        self.n_tokens = int(state["n_tokens"])
        for name, sketch in {**self.sketches, "correlation": self.correlation}.items():
            prefix = f"{name}/"
            sketch.restore({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})


def near_sites(saes: Mapping[Site, SparseAutoencoder], site: Site) -> list[Site]:
    """The site itself and those of its and the neighbouring layers: nearest first, of the same kind before others."""
    layers = {other: -1 if other.layer is None else other.layer for other in [*saes, site]}
    distance = {other: abs(layers[other] - layers[site]) for other in saes}
    near = [other for other in saes if distance[other] <= 1]
    return sorted(near, key=lambda other: (other != site, other.kind != site.kind, distance[other]))


def _correlated(saes: SAEs, site: Site, n: int) -> list[Site]:
    """The near sites whose tables of correlations with n features fit in memory together."""
    sizes = accumulate(4 * n * saes.config(other).n_features for other in near_sites(saes, site))
    return [other for other, size in zip(near_sites(saes, site), sizes, strict=True) if size <= CORRELATION_BYTES]


class TextPass:
    """The tallies of all sites, and the texts that they refer to."""

    def __init__(
        self, model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], features: Mapping[Site, Sequence[int]],
        options: FeaturePageOptions,
    ) -> None:  # fmt: skip
        self.model, self.saes, self.options = model, as_saes(saes), options
        self.tallies = {
            site: SiteTally(self.saes, site, indices, options, model.vocab_size) for site, indices in features.items()
        }
        self.batches, self.passes, self.n_texts, self.n_tokens, self.n_counted = 0, 0, 0, 0, 0
        self.occurrences = torch.zeros(model.vocab_size, dtype=torch.int64)
        self.texts: dict[int, Tensor] = {}
        """Token ids of each text that a tally refers to, by its number."""
        self.random = IntervalSamples(1, options.samples)
        self._alone: dict[Site, SparseAutoencoder] = {}

    @property
    def correlates(self) -> bool:
        """Whether the next batch counts for correlations."""
        return self.n_counted < self.options.correlation_tokens

    @torch.no_grad()
    def update(self, tokens: Tokens) -> None:
        """Adds a batch of texts, in forward passes of texts of about equal length."""
        order = tokens.lengths.argsort(descending=True, stable=True)
        most = max(
            1,
            min(
                PASS_TOKENS,
                CAPTURE_BYTES // (4 * sum(map(self.model.read_width, self.saes.read_sites(self.saes).values()))),
            ),
        )
        start = 0
        while start < len(order):
            longest = int(tokens.lengths[order[start]])
            part = order[start : start + max(1, most // longest)]
            self._run(tokens[part], longest, part.cpu() + self.n_texts)
            start += len(part)
        ids, lengths = tokens.input_ids.cpu().int(), tokens.lengths.tolist()
        for row, length in enumerate(lengths):
            self.texts[self.n_texts + row] = ids[row, ids.shape[1] - length :]
        self.batches, self.n_texts = self.batches + 1, self.n_texts + len(tokens)
        self.n_tokens += sum(lengths)
        if self.batches % FORGET_EVERY == 0:
            self.forget()

    def _run(self, tokens: Tokens, longest: int, numbers: Tensor) -> None:
        """One forward pass of the texts with these numbers [B], the longest of which has so many tokens."""
        tokens = Tokens(tokens.input_ids[:, -longest:], tokens.attention_mask[:, -longest:])
        counted = counted_tokens(self.model, tokens)
        correlates = self.correlates
        near = {other for tally in self.tallies.values() for other in tally.others} if correlates else set()
        sites = [site for site in self.saes if site in self.tallies or site in near]
        reads = self.saes.read_sites(sites)
        run = self.model.run(tokens, capture=reads.values(), need_logits=False)
        rows, positions = counted.nonzero(as_tuple=True)
        padding = tokens.n_positions - tokens.lengths
        ids, positions, rows = tokens.input_ids[rows, positions].cpu(), (positions - padding[rows]).cpu(), rows.cpu()
        every: dict[Site, SparseFeatures] = {}
        for site in sites:
            x = run.activations[reads[site]][counted]
            if site in near:
                every[site] = self.saes[site].encode_sparse(x)
            if site in self.tallies:
                asked = self._asked_about(site, x, every.get(site))
                self.tallies[site].update(asked, rows, positions, ids, numbers=numbers, generator=self._draws(site))
        if correlates:
            self._correlate(every, len(rows))
        level = torch.zeros_like(rows)
        self.random.add(level, level, numbers[rows], positions, self._draws(None))
        self.occurrences += ids.bincount(minlength=len(self.occurrences))
        self.passes, self.n_counted = self.passes + 1, self.n_counted + len(rows)

    def _draws(self, site: Site | None) -> torch.Generator:
        """Random numbers of a site and batch."""
        number = 0 if site is None else 1 + list(self.tallies).index(site)
        seed = (self.options.seed * 1_000_003 + self.passes) * 1_009 + number
        return torch.Generator().manual_seed(seed % 2**63)

    def _asked_about(self, site: Site, x: Tensor, every: SparseFeatures | None) -> SparseFeatures:
        """The features asked about, by slot, on the CPU."""
        tally, sae = self.tallies[site], self.saes[site]
        if every is None and not sae.nonlinearity.needs_k:
            if site not in self._alone:
                self._alone[site] = sae.restrict(torch.tensor(tally.features))
            return SparseFeatures(*(column.cpu() for column in self._alone[site].encode_sparse(x)))
        f = SparseFeatures(*(column.cpu() for column in (every or sae.encode_sparse(x))))
        return by_slot(f, tally.slot_of)

    def _correlate(self, every: Mapping[Site, SparseFeatures], n_tokens: int) -> None:
        """Adds the batch to the correlations of every site with its neighbours."""
        on_cpu = {site: SparseFeatures(*(column.cpu() for column in f)) for site, f in every.items()}
        for site, tally in self.tallies.items():
            if not tally.others:
                continue
            columns = [
                (f.token, f.feature + offset, f.value)
                for offset, f in zip(tally.offsets, (on_cpu[other] for other in tally.others), strict=False)
            ]
            joined = SparseFeatures(*(torch.cat(blocks) for blocks in zip(*columns, strict=True)))
            tally.correlation.update(by_slot(on_cpu[site], tally.slot_of), joined, n_tokens)

    def forget(self) -> None:
        """Drops the texts that no tally refers to."""
        referred = [self.random.text.flatten()]
        for tally in self.tallies.values():
            tally.strongest.merge()
            referred += [tally.samples.text.flatten(), tally.strongest.text.flatten()]
        wanted = torch.cat(referred).unique().tolist()
        self.texts = {number: self.texts[number] for number in wanted if number >= 0}

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, to go on from later."""
        self.forget()
        empty = torch.zeros(0, dtype=torch.int32)
        tensors = {name: torch.tensor(getattr(self, name)) for name in NUMBERS} | {"occurrences": self.occurrences}
        tensors |= {
            "texts/number": torch.tensor(list(self.texts), dtype=torch.int64),
            "texts/length": torch.tensor([len(ids) for ids in self.texts.values()], dtype=torch.int64),
            "texts/ids": torch.cat([empty, *self.texts.values()]),
        }
        tensors |= {f"random/{name}": x for name, x in self.random.state().items()}
        for site, tally in self.tallies.items():
            tensors |= {f"{site}/{name}": x for name, x in tally.state().items()}
        return tensors

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name in NUMBERS:
            setattr(self, name, int(state[name]))
        self.occurrences = state["occurrences"]
        ids = state["texts/ids"].split(state["texts/length"].tolist())
        self.texts = dict(zip(state["texts/number"].tolist(), ids, strict=True))
        self.random.restore({name: state[f"random/{name}"] for name in self.random.state()})
        for site, tally in self.tallies.items():
            prefix = f"{site}/"
            tally.restore({name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)})


def by_slot(f: SparseFeatures, slot_of: Tensor) -> SparseFeatures:
    """Only the features that have a slot (not -1 in `slot_of` [F]), by slot instead of index."""
    slot = slot_of[f.feature]
    asked = slot >= 0
    return SparseFeatures(f.token[asked], slot[asked], f.value[asked])
