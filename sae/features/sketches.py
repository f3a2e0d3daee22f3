"""Sketches of a feature's activations while a text streams by: all that its page needs, in memory that does not grow.

1. `ActivationHistogram`: counts in `BINS` equal bins from 0 to a power of two above the largest activation so far. When
   a larger one comes, 2^s neighbouring bins become one: counts stay exact.
2. `IntervalSamples`: every occurrence draws a random number; of each of `LEVELS` levels of activation those with the m
   largest are kept (a bottom-k sketch). Levels become one as bins do, and the m largest of levels taken together are a
   uniform sample of these, without replacement.
3. `StrongestContexts`: occurrences, one a text, in the order of (how many of the same token are stronger, −activation):
   the strongest of each token come first, then the second of each. Whatever comes later never moves one up, so that
   what is dropped would not have been shown.
4. `TokenSums`: Σ of activation by (feature, token).

Features are told by their slot, 0 to n - 1. Shapes: n slots, k occurrences given at once, m kept.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sae.data.predictions import Totals

BINS = 512
LEVELS = 32
UNSET = -200
"""log2 of the range of a histogram that has seen nothing; no float32 above zero is as small."""
MERGED_AT_ONCE = 2**16
"""Occurrences that wait until they are merged into the strongest ones."""
PENDING_PAIRS = 2**20
DENSE_PAIRS = 2**24
"""Pairs of slot and token up to which a table of all of them is kept."""


class ActivationHistogram(Totals):
    """Counts of activations above zero."""

    def __init__(self, n: int) -> None:
        self.counts = torch.zeros(n, BINS, dtype=torch.int64)
        self.exponent = torch.full((n,), UNSET, dtype=torch.int64)  # log2 of the range

    def widen(self, slot: Tensor, value: Tensor) -> Tensor:
        """Makes room for activations [k] > 0 of slots [k]; by how many doublings each range grew, [n]."""
        peak = torch.zeros(len(self.exponent)).scatter_reduce_(0, slot, value, "amax")
        needed = torch.where(peak > 0, torch.frexp(peak).exponent.long(), UNSET)  # peak < 2^needed
        doublings = (needed - self.exponent).clamp(min=0)
        self.exponent += doublings
        for times in doublings.unique().tolist():
            if times:
                grown = (doublings == times).nonzero()[:, 0]
                size = 2 ** min(times, BINS.bit_length() - 1)
                folded = self.counts[grown].reshape(len(grown), BINS // size, size).sum(-1)
                self.counts[grown] = torch.nn.functional.pad(folded, (0, BINS - BINS // size))
        return doublings

    def bins(self, slot: Tensor, value: Tensor) -> Tensor:
        """The bin of each activation, [k]: floor(BINS · value / range), exactly, since the range is a power of two."""
        return torch.ldexp(value, BINS.bit_length() - 1 - self.exponent[slot]).long()

    def add(self, slot: Tensor, bins: Tensor) -> None:
        """Counts occurrences [k] whose bins are known."""
        size = len(self.exponent) * BINS
        self.counts += torch.bincount(slot * BINS + bins, minlength=size).reshape(-1, BINS)

    def edges(self, slot: int) -> Tensor:
        """The bounds of a slot's bins, [BINS + 1]."""
        exponent = self.exponent[slot].clamp(min=-126)
        return torch.ldexp(torch.arange(BINS + 1, dtype=torch.float64), exponent - (BINS.bit_length() - 1))

    def used(self, slot: int) -> int:
        """How many bins there are up to the last that is not empty."""
        filled = self.counts[slot].nonzero()[:, 0]
        return int(filled[-1]) + 1 if len(filled) else 0

    def quantile(self, slot: int, share: float) -> float:
        """The activation that this share of those above zero is below, within a bin's width: linear in the bin."""
        cumulative = self.counts[slot].cumsum(0).double()
        wanted = share * cumulative[-1]
        index = int(torch.searchsorted(cumulative, wanted).clamp(max=BINS - 1))
        before = cumulative[index - 1] if index else cumulative.new_zeros(())
        low, high = self.edges(slot)[index : index + 2]
        inside = (wanted - before) / max(float(cumulative[index] - before), 1.0)
        return float(low + (high - low) * inside)


class IntervalSamples(Totals):
    """Random occurrences of every level of activation: text and position of each."""

    def __init__(self, n: int, m: int) -> None:
        self.priority = torch.zeros(n, LEVELS, m)  # [n, LEVELS, m], largest first; 0 where there is none
        self.text = torch.full((n, LEVELS, m), -1, dtype=torch.int64)
        self.position = torch.zeros(n, LEVELS, m, dtype=torch.int64)

    def widen(self, doublings: Tensor) -> None:
        """Levels become one where a histogram's range grew, as its bins do."""
        m = self.priority.shape[-1]
        for times in doublings.unique().tolist():
            if not times or not m:
                continue
            grown = (doublings == times).nonzero()[:, 0]
            size = 2 ** min(times, LEVELS.bit_length() - 1)
            shape = (len(grown), LEVELS // size, size * m)
            priority, order = self.priority[grown].reshape(shape).topk(m, dim=-1)
            for name, values in (("priority", priority), ("text", None), ("position", None)):
                table = getattr(self, name)
                moved = table[grown].reshape(shape).gather(-1, order) if values is None else values
                empty = torch.full((len(grown), LEVELS, m), -1 if name == "text" else 0, dtype=table.dtype)
                empty[:, : LEVELS // size] = moved
                table[grown] = empty

    def add(self, slot: Tensor, level: Tensor, text: Tensor, position: Tensor, generator: torch.Generator) -> None:
        """Takes occurrences [k] in with a probability that makes all of a level equally likely to stay."""
        n, levels, m = self.priority.shape
        drawn = torch.rand(len(slot), generator=generator)
        if not m:
            return
        group = slot * levels + level
        priority, texts, positions = (x.view(n * levels, m) for x in (self.priority, self.text, self.position))
        taken = (drawn > priority[group, -1]).nonzero()[:, 0]
        taken = taken[drawn[taken].argsort(descending=True)]
        taken = taken[group[taken].argsort(stable=True)]
        group, drawn = group[taken], drawn[taken]
        rank = ranks(group)
        first = rank < m
        group, drawn, rank, taken = group[first], drawn[first], rank[first], taken[first]
        changed, row = group.unique(return_inverse=True)
        new = torch.zeros(len(changed), m), torch.full((len(changed), m), -1), torch.zeros(len(changed), m).long()
        for table, values in zip(new, (drawn, text[taken], position[taken]), strict=True):
            table[row, rank] = values
        best, order = torch.cat([priority[changed], new[0]], 1).topk(m, dim=-1)
        priority[changed] = best
        texts[changed] = torch.cat([texts[changed], new[1]], 1).gather(1, order)
        positions[changed] = torch.cat([positions[changed], new[2]], 1).gather(1, order)

    def of_levels(self, slot: int, levels: slice) -> list[tuple[int, int]]:
        """A uniform sample of m occurrences, or all there are, of some levels of a slot: (text, position) of each."""
        m = self.priority.shape[-1]
        priority = self.priority[slot, levels].flatten()
        chosen = priority.topk(min(m, len(priority))).indices
        chosen = chosen[priority[chosen] > 0]
        text, position = (x[slot, levels].flatten()[chosen].tolist() for x in (self.text, self.position))
        return list(zip(text, position, strict=True))


class StrongestContexts(Totals):
    """The strongest occurrences of each slot, one a text, the first of every token before the second of any."""

    def __init__(self, n: int, m: int) -> None:
        self.value = torch.zeros(n, m)  # [n, m] in the order they are shown in; 0 where there is none
        self.token = torch.full((n, m), -1, dtype=torch.int64)
        self.text = torch.full((n, m), -1, dtype=torch.int64)
        self.position = torch.zeros(n, m, dtype=torch.int64)
        self.floor = torch.zeros(n)
        """What an occurrence must exceed, [n]: once the m strongest tokens are known, the weakest of these."""
        self.waiting = torch.zeros(4, 0, dtype=torch.int64)
        self.waiting_value = torch.zeros(0)

    def add(self, slot: Tensor, value: Tensor, token: Tensor, text: Tensor, position: Tensor) -> None:
        """Takes occurrences [k] in, at most one a slot and text."""
        stronger = value > self.floor[slot]
        taken = torch.stack([x[stronger] for x in (slot, token, text, position)])
        self.waiting = torch.cat([self.waiting, taken], 1)
        self.waiting_value = torch.cat([self.waiting_value, value[stronger]])
        if len(self.waiting_value) > MERGED_AT_ONCE:
            self.merge()

    def merge(self) -> None:
        """Puts those that wait in their places."""
        m = self.value.shape[1]
        changed = self.waiting[0].unique()
        old_slot, old = (self.value[changed] > 0).nonzero(as_tuple=True)
        old_slot = changed[old_slot]
        fields = [
            torch.cat([table[old_slot, old], waiting])
            for table, waiting in zip((self.token, self.text, self.position), self.waiting[1:], strict=True)
        ]
        slot, value = torch.cat([old_slot, self.waiting[0]]), torch.cat([self.value[old_slot, old], self.waiting_value])
        self.waiting, self.waiting_value = self.waiting[:, :0], self.waiting_value[:0]

        order = fields[1].argsort(stable=True)  # of equal values the first text's comes first
        order = order[value[order].argsort(descending=True, stable=True)]
        by_token = order[fields[0][order].argsort(stable=True)]
        by_token = by_token[slot[by_token].argsort(stable=True)]
        same_token = torch.stack([slot, fields[0]])[:, by_token]
        is_first = torch.ones(len(by_token), dtype=torch.bool)
        is_first[1:] = (same_token[:, 1:] != same_token[:, :-1]).any(0)
        weaker_than = torch.empty_like(slot)  # how many of its slot and token are stronger
        weaker_than[by_token] = ranks(is_first.cumsum(0))
        order = order[weaker_than[order].argsort(stable=True)]
        order = order[slot[order].argsort(stable=True)]
        rank = ranks(slot[order])
        order, rank = order[rank < m], rank[rank < m]
        for table in (self.value, self.token, self.text, self.position):
            table[changed] = 0 if table is self.value or table is self.position else -1
        for table, values in zip((self.value, self.token, self.text, self.position), (value, *fields), strict=True):
            table[slot[order], rank] = values[order]
        full = order[(rank == m - 1) & (weaker_than[order] == 0)]
        self.floor[slot[full]] = value[full]

    def of(self, slot: int) -> list[tuple[int, int]]:
        """(text, position) of those kept, in order."""
        occupied = self.value[slot] > 0
        return list(zip(self.text[slot][occupied].tolist(), self.position[slot][occupied].tolist(), strict=True))


def ranks(group: Tensor) -> Tensor:
    """The number of each entry within its group, of entries [k] sorted by group: 0, 1, 0, 0, 1, 2, ..."""
    if not len(group):
        return group.clone()
    begins = torch.ones(len(group), dtype=torch.bool)
    begins[1:] = group[1:] != group[:-1]
    number = torch.arange(len(group))
    return number - number[begins][begins.cumsum(0) - 1]


class TokenSums(Totals):
    """Σ of activation by (slot, token id): of all pairs where they are few, else of those that occurred."""

    def __init__(self, n: int, vocab_size: int) -> None:
        self.n, self.vocab_size = n, vocab_size
        self.is_dense = int(n * vocab_size <= DENSE_PAIRS)
        self.keys = torch.zeros(0, dtype=torch.int64)
        self.values = torch.zeros(n * vocab_size if self.is_dense else 0, dtype=torch.float64)
        self.waiting_keys = torch.zeros(0, dtype=torch.int64)
        self.waiting_values = torch.zeros(0, dtype=torch.float64)

    def add(self, slot: Tensor, token_id: Tensor, value: Tensor) -> None:
        """slot, token_id, value: [k] each."""
        keys = slot * self.vocab_size + token_id
        if self.is_dense:
            self.values.index_add_(0, keys, value.double())
            return
        self.waiting_keys = torch.cat([self.waiting_keys, keys])
        self.waiting_values = torch.cat([self.waiting_values, value.double()])
        if len(self.waiting_keys) > PENDING_PAIRS:
            self._compact()

    def _compact(self) -> None:
        keys, inverse = torch.cat([self.keys, self.waiting_keys]).unique(return_inverse=True)
        sums = torch.cat([self.values, self.waiting_values])
        self.keys, self.values = keys, torch.zeros(len(keys), dtype=torch.float64).index_add_(0, inverse, sums)
        self.waiting_keys, self.waiting_values = self.waiting_keys[:0], self.waiting_values[:0]

    def top(self, k: int, occurrences: Tensor, prior: float) -> list[list[int]]:
        """For each slot the up to k token ids with the largest Σ f / (n + prior), given n [V], largest first."""
        if self.is_dense:
            keys = (self.values > 0).nonzero()[:, 0]
            values = self.values[keys]
        else:
            self._compact()
            keys, values = self.keys, self.values
        values = values / (occurrences[keys % self.vocab_size] + prior)
        order = values.argsort(descending=True, stable=True)
        order = order[torch.div(keys[order], self.vocab_size, rounding_mode="floor").argsort(stable=True)]
        slots = torch.div(keys[order], self.vocab_size, rounding_mode="floor")
        starts = torch.searchsorted(slots, torch.arange(self.n + 1)).tolist()
        return [
            (keys[order[start : min(end, start + k)]] % self.vocab_size).tolist() for start, end in pairwise(starts)
        ]
