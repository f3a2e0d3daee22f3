"""Groups of features as a picture: a panel a group, its best plane, coloured by the feature that is strongest there.

Each point is a token of the text; the commonest tokens are written where they are on average.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae._plotting import COLOURS, PALE, quiet, save_figure
from sae.features.groups import FeatureGroup, FeatureGroups

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
PANELS, COLUMNS = 9, 3
WRITTEN = 12
"""Most tokens that are written in a panel."""
NEAR = (0.2, 0.07)
"""Share of a panel's width within which a word covers another, along and up."""


def plot_groups(groups: FeatureGroups, path: str | Path, *, overwrite: bool = False) -> Path:
    """The first groups, irreducible ones before others, as .svg, .png or .pdf."""
    shown = groups.groups[:PANELS]
    n_rows = max(1, math.ceil(len(shown) / COLUMNS))
    figure = Figure(figsize=(10.5, 3.4 * n_rows), layout="constrained")
    panels = figure.subplots(n_rows, COLUMNS, squeeze=False).ravel()
    for axes, group in zip(panels, shown, strict=False):
        _panel(axes, group, groups.strings)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    if not shown:
        figure.suptitle("no group of features fires often enough to be tested", fontsize=9)
    return save_figure(figure, path, overwrite=overwrite)


def _panel(axes: Axes, group: FeatureGroup, strings: dict[int, str]) -> None:
    plane = group.best
    assert plane is not None
    x, y, strongest = (np.array(column) for column in zip(*group.points, strict=True))
    for number in range(len(group.features)):
        mine = strongest == number
        if mine.any():
            colour = COLOURS[number] if number < len(COLOURS) else PALE
            axes.plot(x[mine], y[mine], "o", ms=2.5, alpha=0.5, mew=0, color=colour)
    _write_tokens(axes, group, np.stack([x, y], axis=1), strings)
    names = ", ".join(map(str, group.features[:5])) + (", …" if len(group.features) > 5 else "")
    indices = f"S {plane.test.separability:.2f}, M {plane.test.mixture:.2f}"
    axes.set_title(f"{group.site}: {names}\n{group.verdict}; {indices}", fontsize=8, loc="left")
    axes.set_xlabel(f"component {plane.components[0]}", fontsize=7)
    axes.set_ylabel(f"component {plane.components[1]}", fontsize=7)
    axes.set_aspect("equal", adjustable="datalim")
    quiet(axes, size=6)


def _write_tokens(axes: Axes, group: FeatureGroup, points: Array, strings: dict[int, str]) -> None:
    """Write the commonest tokens where they are on average, those that would cover another one left out."""
    ids, span = np.array(group.token_ids), float(np.ptp(points, axis=0).max()) + 1e-9
    centres: list[Array] = []
    for token, _ in Counter(group.token_ids).most_common(WRITTEN):
        centre = points[ids == token].mean(0)
        if any((np.abs(centre - other) / span < NEAR).all() for other in centres):
            continue
        centres.append(centre)
        box = {"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.7}
        word = strings.get(token, "").strip() or repr(strings.get(token, ""))
        axes.annotate(word, tuple(centre), fontsize=7, ha="center", va="center", parse_math=False, bbox=box)
