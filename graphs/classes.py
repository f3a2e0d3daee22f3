"""Two classes of prompts, and for which of them each feature of a graph is on.

1. A node's `by_case` attribute holds the mean activation of its feature by case and span of the prompts. The node is
   read at its own span; without one, at the span where its feature is strongest.
2. The cases are split in two so that sum |effect| · |contrast · correlation| over the nodes is largest, where

       contrast = (b - a) / (|a| + |b|)

   with a and b the mean over the cases of either side: -1 for a feature that is on for the first class alone, 1 for
   the second, 0 for one that does not tell them apart. The correlation is that of the means with the side a case is
   on; without it a single case with a mean of zero would count as a class. What a circuit distinguishes is so found in
   the data, not in the names of the cases.
3. A class is called by what the names of its cases share (`singular` for singular_plural and singular_singular).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from graphs.feature_graph import FeatureGraph, Node

Array: TypeAlias = "np.ndarray[Any, np.dtype[Any]]"
MOST_CASES = 10
"""With more cases the splits are too many to try, and no two classes would tell them apart."""
TELLS = 0.5
"""From this contrast on, three times as strong for one class as for the other, a feature is said to be on for it."""


@dataclass(frozen=True)
class Classes:
    """A split of the cases, and the side each feature is on."""

    names: tuple[str, str]
    """Names of the classes."""
    cases: tuple[tuple[str, ...], tuple[str, ...]]
    """The cases of each."""
    contrast: dict[str, float]
    """Node id -> -1 (on for the first class alone) to 1 (for the second); nodes without `by_case` are left out."""

    def side(self, id: str) -> str:
        """The class that a node's feature is on for; `both` where it hardly tells them apart, nothing where unknown."""
        if id not in self.contrast:
            return ""
        contrast = self.contrast[id]
        return "both" if abs(contrast) < TELLS else self.names[int(contrast > 0)].replace("_", " ")


def find_classes(graph: FeatureGraph) -> Classes | None:
    """The split of the graph's cases; None with fewer than two cases, or more than `MOST_CASES`."""
    profiles = {node.id: profile for node in graph.nodes() if (profile := case_means(node))}
    cases = sorted({case for profile in profiles.values() for case in profile})
    if not 2 <= len(cases) <= MOST_CASES:
        return None
    effects = np.array([abs(graph.node(id).effect) for id in profiles])
    means = np.array([[profile.get(case, 0.0) for case in cases] for profile in profiles.values()])  # [nodes, cases]
    best = -1.0
    is_second: Array = np.ones(len(cases), dtype=bool)
    for side in _sides(cases):
        on_side = np.array([case in side for case in cases])
        told = float(effects @ np.abs(_contrast(means, on_side) * _correlation(means, on_side)))
        if told > best * (1 + 1e-9):
            best, is_second = told, on_side
    first, second = (tuple(itertools.compress(cases, chosen)) for chosen in (~is_second, is_second))
    contrast = dict(zip(profiles, _contrast(means, is_second).tolist(), strict=True))
    return Classes(_names(first, second), (first, second), contrast)


def case_means(node: Node) -> dict[str, float]:
    """Mean activation by case, at the node's span or the one where its feature is strongest; empty where unknown."""
    by_case = node.attributes.get("by_case") or {}
    spans = list(dict.fromkeys(span for by_span in by_case.values() for span in by_span))
    if not spans:
        return {}
    strongest = max(spans, key=lambda span: sum(by_span.get(span, 0.0) for by_span in by_case.values()))
    span = node.position if node.position in spans else strongest
    return {case: by_span.get(span, 0.0) for case, by_span in by_case.items()}


def _sides(cases: Sequence[str]) -> list[tuple[str, ...]]:
    """The second side of every split into two; the first case is always on the first side. Equal halves come first."""
    others = cases[1:]
    sides = [side for n in range(1, len(others) + 1) for side in itertools.combinations(others, n)]
    return sorted(sides, key=lambda side: abs(len(cases) - 2 * len(side)))


def _contrast(means: Array, second: Array) -> Array:
    """The contrast [nodes] of the means [nodes, cases] of two sides; second: [cases] which are on the second."""
    a, b = means[:, ~second].mean(1), means[:, second].mean(1)
    size = np.abs(a) + np.abs(b)
    return np.divide(b - a, size, out=np.zeros_like(size), where=size > 0)


def _correlation(means: Array, second: Array) -> Array:
    """Correlation [nodes] of the cases' means with the side they are on; 0 where all means are alike."""
    centred, side = means - means.mean(1, keepdims=True), second - second.mean()
    alike = np.ptp(means, axis=1) <= 1e-9 * np.abs(means).max(1)
    sizes = np.linalg.norm(centred, axis=1) * np.linalg.norm(side)
    return np.divide(centred @ side, sizes, out=np.zeros_like(sizes), where=~alike)


def _names(first: Sequence[str], second: Sequence[str]) -> tuple[str, str]:
    """The words that the cases of each side share, where the sides differ in them."""
    words = [[case.split("_") for case in side] for side in (first, second)]
    if len({len(case) for side in words for case in side}) == 1:
        shared = [[column[0] if len(set(column)) == 1 else "" for column in zip(*side, strict=True)] for side in words]
        differing = [(a, b) for a, b in zip(*shared, strict=True) if a and b and a != b]
        if differing:
            return "_".join(a for a, _ in differing), "_".join(b for _, b in differing)
    return " / ".join(first), " / ".join(second)
