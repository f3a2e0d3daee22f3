"""An evaluation as a picture: fidelity by site, and how often the features of each site fire.

1. Bars, sites in the order of the forward pass: explained variance and CE recovered with this site alone spliced.
2. A small histogram a site: features by log10 of the share of tokens they fire on; dead ones are in the title.
"""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae.errors import UserError
from sae.evaluation import Evaluation, SiteMetrics
from sae.files import atomic_write

COLUMNS = 4
VARIANCE, RECOVERED, DENSITY = "#3b6fb6", "#e0893a", "#6a6a6a"
SUFFIXES = (".png", ".svg", ".pdf")


def plot_evaluation(evaluation: Evaluation, path: str | Path) -> Path:
    """Write the picture as .png, .svg or .pdf."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"unknown picture format {path.suffix[1:]!r}: allowed are png, svg and pdf")
    with atomic_write(path) as temporary:
        evaluation_figure(evaluation).savefig(temporary, dpi=130)
    return path


def evaluation_figure(evaluation: Evaluation) -> Figure:
    """The picture as a matplotlib figure: the bars first, then one histogram a site."""
    n_rows = math.ceil(len(evaluation.sites) / COLUMNS)
    figure = Figure(figsize=(10, 3 + 1.4 * n_rows), layout="constrained")
    grid = figure.add_gridspec(1 + n_rows, COLUMNS, height_ratios=[2.2] + [1.0] * n_rows)
    _bars(figure.add_subplot(grid[0, :]), evaluation)
    for i, (name, metrics) in enumerate(evaluation.sites.items()):
        _histogram(figure.add_subplot(grid[1 + i // COLUMNS, i % COLUMNS]), name, metrics)
    figure.supxlabel("log10 of the share of tokens a feature fires on", fontsize=9)
    return figure


def _bars(axes: Axes, evaluation: Evaluation) -> None:
    sites = evaluation.sites
    variance = [m.explained_variance for m in sites.values()]
    recovered = [m.predictions.ce_recovered for m in sites.values()]
    axes.bar([i - 0.2 for i in range(len(sites))], variance, width=0.4, color=VARIANCE, label="explained variance")
    axes.bar([i + 0.2 for i in range(len(sites))], recovered, width=0.4, color=RECOVERED, label="CE recovered")
    axes.set_xticks(range(len(sites)), list(sites), rotation=45 if len(sites) > 8 else 0, fontsize=8)
    finite = [value for value in (*variance, *recovered) if math.isfinite(value)]
    axes.set_ylim(min(0.0, max(-0.5, min(finite, default=0.0))), 1.05)
    axes.axhline(1.0, color="0.8", linewidth=0.8, zorder=0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    spliced = evaluation.spliced["all"]
    axes.set_title(
        f"each site alone; all spliced: CE {spliced.ce:.3f}, the model's own {evaluation.ce_model:.3f} "
        f"({evaluation.n_tokens:,} tokens)",
        fontsize=9,
        loc="left",
    )


def _histogram(axes: Axes, name: str, metrics: SiteMetrics) -> None:
    histogram = metrics.density_histogram
    width = histogram.edges[1] - histogram.edges[0]
    axes.bar(histogram.edges[:-1], histogram.counts, width=width, align="edge", color=DENSITY)
    axes.set_title(f"{name}  L0 {metrics.l0:.3g}, dead {metrics.dead_fraction:.0%}", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
