"""A score as a picture: the pairs of its largest features, coloured by what they add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from sae._plotting import COLOURS, PALE, save_figure

COLOUR_MAP = LinearSegmentedColormap.from_list("pairs", [COLOURS[1], "white", COLOURS[0]])
FAINT = 0.75
"""The largest number has this share of the full colour, so that it can be read on it."""


@dataclass(frozen=True)
class Side:
    """The rows or the columns of the picture."""

    title: str
    """Where the features are."""
    labels: Sequence[Sequence[str]]
    """Of each its name, and the words it is on."""


def plot_pairs(
    path: str | Path, values: NDArray, *, title: str, rows: Side, columns: Side, overwrite: bool = False
) -> Path:
    """Draw one cell a pair, values [rows, columns]. .svg, .png or .pdf."""
    height, width = values.shape
    figure = Figure(figsize=(2.6 + 0.86 * width, 1.7 + 0.44 * height), layout="constrained")
    axes = figure.subplots()
    limit = (abs(values).max() or 1.0) / FAINT
    axes.imshow(values, cmap=COLOUR_MAP, vmin=-limit, vmax=limit, aspect="auto")
    for row in range(height):
        for column in range(width):
            axes.text(column, row, f"{values[row, column]:+.2f}", ha="center", va="center", fontsize=8)
    axes.set_yticks(range(height), [" · ".join(label) for label in rows.labels], fontsize=8)
    axes.set_xticks(range(width), ["\n".join(label) for label in columns.labels], fontsize=8)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_ylabel(rows.title, fontsize=9, color=PALE)
    axes.set_xlabel(columns.title, fontsize=9, color=PALE)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path, overwrite=overwrite)
