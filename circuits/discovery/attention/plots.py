"""A score as a picture: the pairs of its largest features, coloured by what they add."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from circuits.discovery.attention.results import QKAttribution, QKTerm
from sae._plotting import COLOURS, PALE, save_figure

COLOUR_MAP = LinearSegmentedColormap.from_list("pairs", [COLOURS[1], "white", COLOURS[0]])
FAINT = 0.75
"""The largest number has this share of the full colour, so that it can be read on it."""


def plot_scores(score: QKAttribution, path: str | Path, *, n: int = 6, overwrite: bool = False) -> Path:
    """One cell a pair, of the n largest features at the query (rows) and at the key (columns). .svg, .png or .pdf."""
    table = score.matrix(n)
    values = table.to_numpy()
    figure = Figure(figsize=(2.6 + 0.86 * len(table.columns), 1.7 + 0.44 * len(table)), layout="constrained")
    axes = figure.subplots()
    limit = (abs(values).max() or 1.0) / FAINT
    axes.imshow(values, cmap=COLOUR_MAP, vmin=-limit, vmax=limit, aspect="auto")
    for (row, column), value in [((r, c), values[r, c]) for r in range(len(table)) for c in range(len(table.columns))]:
        axes.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(table)), _labels(score.queries, list(table.index), " · "), fontsize=8)
    axes.set_xticks(range(len(table.columns)), _labels(score.keys, list(table.columns), "\n"), fontsize=8)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    than = "" if score.than is None else f" less {score.than}"
    axes.set_ylabel(f"at the {score.query}", fontsize=9, color=PALE)
    axes.set_xlabel(f"at the {score.key}{than}", fontsize=9, color=PALE)
    axes.xaxis.set_label_position("top")
    figure.suptitle(f"{score.title}: {score.score:+.2f} before the softmax", fontsize=10)
    return save_figure(figure, path, overwrite=overwrite)


def _labels(terms: list[QKTerm], names: list[str], between: str) -> list[str]:
    """Numbers of features, each with the first two tokens it is on; `between` stands between them."""
    words = {term.node: [word.strip() for word in term.words[:2]] for term in terms}
    return [between.join([name.rpartition("/")[2], *words.get(name, [])]) for name in names]
