"""Whether two-dimensional points are one thing or two (Engels et al. 2024, arXiv 2405.14860, section 3).

A plane of joint activations is *reducible* where it is a product or a mixture of two one-dimensional features:

1. *Separability index*: the mutual information of the two coordinates, in bits, in the rotation where it is smallest.
   Points are whitened first, so that independent features that are not at right angles are told apart too. A histogram
   finds information in independent points as well: `chance` is what it finds after shuffling.
2. *ε-mixture index*: the largest share of points that a direction v and an offset c bring close to zero,
   |v · x + c| < ε sqrt(mean (v · x + c)²). In a mixture of lines these are the points of one line.

A circle has a high separability and a low mixture index; independent features have a low separability; features of
which one fires at a time have a high mixture index.

Shapes: N points in a plane.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
    Flags: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

EPSILON = 0.1
BINS = 10
ANGLES = 100
OFFSETS = 101
SHUFFLES = 20
RESAMPLES = 200
LEAST_SEPARABILITY, MOST_MIXTURE = 0.2, 0.3
"""From what separability above chance, and up to what mixture index, points are irreducible."""


@dataclass(frozen=True)
class Reducibility:
    """The two indices of points in a plane."""

    separability: float
    """Separability index, in bits."""
    separability_interval: tuple[float, float]
    """95 % interval over points, in the rotation that was found."""
    chance: float
    """The same of shuffled coordinates."""
    mixture: float
    """ε-mixture index."""
    mixture_interval: tuple[float, float]
    """95 % interval over points, for the direction that was found."""

    @property
    def is_irreducible(self) -> bool:
        """Whether the points are neither a product nor a mixture."""
        return not (self.is_product or self.is_mixture)

    @property
    def is_product(self) -> bool:
        """Whether the coordinates are nearly independent in some rotation."""
        return self.separability - self.chance < LEAST_SEPARABILITY

    @property
    def is_mixture(self) -> bool:
        """Whether much of the points lies near a line."""
        return self.mixture > MOST_MIXTURE

    @property
    def score(self) -> float:
        """Separability above chance times 1 − mixture index: how much the points are one thing."""
        return max(0.0, self.separability - self.chance) * (1 - self.mixture)


def reducibility(points: Array, *, seed: int = 0) -> Reducibility:
    """The indices of points [N, 2]; chance and intervals are drawn with the seed."""
    draw = np.random.default_rng(seed)
    white = whitened(points)
    value, rotated = separability(white)
    chance = float(np.mean([_information(rotated[:, 0], draw.permutation(rotated[:, 1])) for _ in range(SHUFFLES)]))
    share, inside = mixture(white)
    cells = np.histogram2d(rotated[:, 0], rotated[:, 1], bins=BINS)[0]
    drawn = draw.multinomial(len(points), (cells / cells.sum()).ravel(), size=RESAMPLES).reshape(-1, *cells.shape)
    informations = [_information_of(one) for one in drawn]
    bias = float(np.mean(informations)) - value  # that of a histogram of fewer different points
    low, high = (float(np.quantile(informations, q)) - bias for q in (0.025, 0.975))
    return Reducibility(value, (low, high), chance, share, _share_interval(int(inside.sum()), len(points)))


def whitened(points: Array) -> Array:
    """Points [N, 2] with mean 0, variances 1 and no correlation."""
    centred = points - points.mean(0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    return centred @ vectors / np.sqrt(np.maximum(values, 1e-12))


def separability(points: Array) -> tuple[float, Array]:
    """The smallest mutual information over rotations, in bits, and the points rotated so."""
    turned = [_rotated(points, angle) for angle in np.linspace(0, np.pi / 2, ANGLES, endpoint=False)]
    informations = [_information(both[:, 0], both[:, 1]) for both in turned]
    best = int(np.argmin(informations))
    return informations[best], turned[best]


def mixture(points: Array) -> tuple[float, Flags]:
    """The largest share of points near a line, and whether each is, [N] bool."""
    best = -1.0
    inside: Flags = np.zeros(len(points), dtype=bool)
    for angle in np.linspace(0, np.pi, 2 * ANGLES, endpoint=False):
        projection = points @ np.array([np.cos(angle), np.sin(angle)])
        ordered = np.sort(projection)
        offsets: Array = np.append(np.linspace(-ordered[-1], -ordered[0], OFFSETS), -np.median(projection))
        width = EPSILON * np.sqrt(projection.var() + (projection.mean() + offsets) ** 2)
        counts = np.searchsorted(ordered, -offsets + width) - np.searchsorted(ordered, -offsets - width, side="right")
        top = int(counts.argmax())
        if counts[top] > best:
            best, inside = counts[top], np.abs(projection + offsets[top]) < width[top]
    return float(inside.mean()), inside


def _rotated(points: Array, angle: float) -> Array:
    return points @ np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])


def _information(x: Array, y: Array) -> float:
    return _information_of(np.histogram2d(x, y, bins=BINS)[0])


def _information_of(counts: Array) -> float:
    """Mutual information of a table of counts, in bits."""
    joint = counts / counts.sum()
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    some = joint > 0
    return float((joint[some] * np.log2(joint[some] / product[some])).sum())


def _share_interval(k: int, n: int) -> tuple[float, float]:
    """95 % interval of k of n (Clopper and Pearson 1934)."""
    from scipy.stats import beta

    low = 0.0 if k == 0 else float(beta.ppf(0.025, k, n - k + 1))
    return low, 1.0 if k == n else float(beta.ppf(0.975, k + 1, n - k))
