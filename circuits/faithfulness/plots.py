"""Shares of a behaviour over circuit sizes as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from sae._plotting import COLOURS, quiet, save_figure

RULE, DRAWN = "0.8", "0.5"
MARKERS = "os^"


class Curve(NamedTuple):
    """A line of the picture."""

    label: str
    """Name in the legend."""
    values: Sequence[float]
    """One a size."""
    intervals: Sequence[Sequence[float]] = ()
    """[low, high] of every value, or none."""


def plot_curves(
    path: str | Path,
    sizes: Sequence[int],
    curves: Sequence[Curve],
    *,
    xlabel: str,
    levels: Sequence[float],
    random: Sequence[Sequence[float]],
    random_label: str,
    dashed: tuple[str, float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Curves over sizes with their intervals, beside random sets; grey lines at `levels`, a `dashed` one with its name.
    Written as .svg, .png or .pdf; overwrite: whether in place of another program's file.
    """
    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.subplots()
    for level in levels:
        axes.axhline(level, color=RULE, lw=1)
    if dashed:
        axes.axhline(dashed[1], color=RULE, lw=1, ls="--", label=dashed[0])
    for curve, marker, colour in zip(curves, MARKERS, COLOURS, strict=False):
        axes.plot(sizes, curve.values, f"{marker}-", color=colour, label=curve.label)
        if curve.intervals:
            low, high = zip(*curve.intervals, strict=True)
            axes.fill_between(sizes, low, high, color=colour, alpha=0.15, lw=0)
    for draw, values in enumerate(random):
        axes.plot(sizes, values, ":", color=DRAWN, label=random_label if draw == 0 else None)
    axes.set(xscale="log", xlabel=xlabel, ylabel="share of the behaviour")
    shown = _apart(sorted(sizes))
    axes.set_xticks(shown, [f"{size:,}" for size in shown])
    axes.minorticks_off()
    quiet(axes, size=10)
    axes.legend(frameon=False)
    return save_figure(figure, path, overwrite=overwrite)


def _apart(sizes: Sequence[int]) -> list[int]:
    """The rising sizes whose labels do not touch that of the next on a logarithmic axis."""
    gap = 0.07 * math.log(sizes[-1] / sizes[0])
    return [size for size, after in pairwise(sizes) if math.log(after / size) > gap] + [sizes[-1]]
