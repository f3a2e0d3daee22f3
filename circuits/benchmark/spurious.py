"""Spurious correlation removal (SCR; SAEBench): does ablating a concept's features rid a probe of it?

Texts have two labels with two values each. Three probes are trained: of the first label and of the second on balanced
texts, and a *biased* one on texts in which both always go together.

1. Features of a concept, by |mean activation on one value − mean on the other| · |W_dec · probe of the concept|.
2. They are set to zero at the site; the error of the autoencoder stays.
3. In both directions, with the biased probe tested on one label while the other concept's features are ablated,

       SCR = (accuracy ablated − accuracy as it was) / (accuracy of the label's own probe − accuracy as it was),

   0 where the own probe is hardly better. The score is that of the direction in which the biased probe was worse: there
   it went by the other label.

Probes read means over tokens, to which ablation is linear: nothing is run again.

Shapes: B texts, d model width, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.debiasing.data import Labelled, Pairing
from circuits.debiasing.probing import Pooled
from circuits.debiasing.targeted import by_share
from circuits.metrics.fit_probe import regress
from circuits.prompts.alignment import numbered
from circuits.uncertainty.bootstrap import Bootstrap, group_sums

LEAST = 0.001
"""Least accuracy by which a label's own probe must be better than the biased one."""


@dataclass(frozen=True)
class Removal:
    """SCR with n features ablated."""

    data: str
    """Data set."""
    site: str
    """Site."""
    n: int
    """Features ablated."""
    score: float
    """SCR in the direction that counts."""
    interval: tuple[float, float]
    """95 % interval over test texts."""
    kept: str
    """Label that the biased probe is tested on in that direction: intended or spurious."""
    own: float
    """Accuracy of that label's own probe."""
    before: float
    """Accuracy of the biased probe."""
    after: float
    """Accuracy of the biased probe with the other label's features ablated."""
    both: dict[str, float]
    """SCR in each direction, by the label that is kept."""
    features: list[int]
    """The ablated features."""


@dataclass(frozen=True)
class _Probe:
    weight: Tensor  # [d]
    bias: Tensor  # []

    @staticmethod
    def fit(x: Tensor, is_one: Tensor, penalty: float) -> _Probe:
        weight, bias = regress(x.double().numpy(), is_one.int().tolist(), penalty=penalty)
        return _Probe(weight.float(), bias.float())

    def right(self, x: Tensor, is_one: Tensor, lost: Tensor | float = 0.0) -> Tensor:
        """Whether it is right on each text, with `lost` [B] of its output taken away."""
        return ((x @ self.weight + self.bias - lost > 0) == is_one).float()


def spurious_removal(
    data: str, site: str, train: Pooled, texts: Sequence[Labelled], test: Pooled, test_texts: Sequence[Labelled],
    W_dec: Tensor, *, sizes: Sequence[int], penalty: float = 1.0, seed: int = 0, operation: str = "zero",
) -> list[Removal]:  # fmt: skip
    """SCR for some numbers of features; W_dec [F, d] are the decoder rows of the site's autoencoder. Ablated features
    become zero, or with the operation `mean` their mean over the balanced texts learned from.

    Raises UserError where a label has more or fewer than two values.
    """
    pairing = Pairing.of([*texts, *test_texts])
    rows, held_out = balanced_rows(texts, pairing), balanced_rows(test_texts, pairing)
    agreeing = ambiguous_rows(texts, pairing, 2 * len(rows) // 4)
    is_one = {label: _second(texts, pairing, label) for label in ("intended", "spurious")}
    test_is = {label: _second(test_texts, pairing, label)[held_out] for label in is_one}
    probes = {label: _Probe.fit(train.x[rows], is_one[label][rows], penalty) for label in is_one}
    which = numbered([test_texts[row].example.clean for row in held_out.tolist()])
    biased = _Probe.fit(train.x[agreeing], is_one["intended"][agreeing], penalty)
    x, moved = test.x[held_out], test.f[held_out] - (train.f[rows].mean(0) if operation == "mean" else 0)
    right_alone = {label: probe.right(x, test_is[label]) for label, probe in probes.items()}
    before = {label: biased.right(x, test_is[label]) for label in probes}
    orders = {label: by_share(train.f[rows], is_one[label][rows], W_dec @ probes[label].weight) for label in probes}
    counts = "intended" if before["intended"].mean() <= before["spurious"].mean() else "spurious"
    other = {"intended": "spurious", "spurious": "intended"}
    results = []
    for n in sizes:
        after, scores = {}, {}
        for label in probes:
            chosen = orders[other[label]][:n]
            after[label] = biased.right(x, test_is[label], moved[:, chosen] @ (W_dec[chosen] @ biased.weight))
            gap = (right_alone[label].mean() - before[label].mean()).item()
            scores[label] = 0.0 if gap < LEAST else (after[label].mean() - before[label].mean()).item() / gap
        bounds = _interval(after[counts] - before[counts], right_alone[counts] - before[counts], which, seed)
        results.append(
            Removal(
                data, site, n, scores[counts], bounds, counts, right_alone[counts].mean().item(),
                before[counts].mean().item(), after[counts].mean().item(), scores, orders[other[counts]][:n].tolist(),
            )
        )  # fmt: skip
    return results


def balanced_rows(texts: Sequence[Labelled], pairing: Pairing) -> Tensor:
    """Rows of the first texts of each of the four groups, as many of each."""
    groups: dict[str, list[int]] = {pairing.group(text): [] for text in texts}
    for row, text in enumerate(texts):
        groups[pairing.group(text)].append(row)
    size = min(map(len, groups.values())) if len(groups) == 4 else 0
    return torch.tensor(sorted(row for rows in groups.values() for row in rows[:size]), dtype=torch.int64)


def ambiguous_rows(texts: Sequence[Labelled], pairing: Pairing, most: int) -> Tensor:
    """Rows of the first texts of the two groups whose labels go together, `most` of each at most."""
    both = [[row for row, text in enumerate(texts) if (text.intended, text.spurious) == pair]
            for pair in zip(pairing.classes, pairing.spurious, strict=True)]  # fmt: skip
    size = min(most, *map(len, both))
    return torch.tensor(sorted(row for rows in both for row in rows[:size]), dtype=torch.int64)


def _second(texts: Sequence[Labelled], pairing: Pairing, label: str) -> Tensor:
    """[B] whether a text's label is the second of the pairing."""
    second = {"intended": pairing.classes[1], "spurious": pairing.spurious[1]}[label]
    return torch.tensor([getattr(text, label) == second for text in texts])


def _interval(gained: Tensor, possible: Tensor, texts: Tensor, seed: int) -> tuple[float, float]:
    """95 % interval over texts of Σ gained / Σ possible; texts: [B] which text each is."""
    if possible.mean() < LEAST:
        return float("nan"), float("nan")
    sums = group_sums(gained.double()[:, None], texts), group_sums(possible.double(), texts)
    low, high = Bootstrap(seed=seed).intervals(*sums)[0].tolist()
    return low, high
