"""An evaluation as a picture: fidelity by site, what errors cost the model, and how often features fire.

1. Bars, sites in the order of the forward pass: explained variance and CE recovered with this site alone spliced.
2. Bars in nats: what dropping a site's error costs the model, alone, and while those of all other sites are dropped.
3. A small histogram a site: features by log10 of the share of tokens they fire on; dead ones are in the title.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae._plotting import COLOURS, PALE, RULE, quiet, save_figure
from sae.evaluation.results import Evaluation, SiteMetrics

COLUMNS = 5
BLUE, ORANGE = COLOURS[:2]
Bars = tuple[str, str, Sequence[float]]


def plot_evaluation(evaluation: Evaluation, path: str | Path) -> Path:
    """Write the picture as .png, .svg or .pdf."""
    return save_figure(evaluation_figure(evaluation), path)


def evaluation_figure(evaluation: Evaluation) -> Figure:
    """The picture as a matplotlib figure: the bars first, then one histogram a site."""
    n_rows = math.ceil(len(evaluation.sites) / COLUMNS)
    figure = Figure(figsize=(10, 4.6 + 1.3 * n_rows), layout="constrained")
    halves = figure.add_gridspec(2, 1, height_ratios=[4.6, 1.3 * n_rows])
    top, bottom = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    fidelity, cost = top.subplots(2, 1, sharex=True)
    _fidelity(fidelity, evaluation)
    _cost(cost, evaluation)
    first: Axes | None = None
    for i, (name, metrics) in enumerate(evaluation.sites.items()):
        axes = bottom.add_subplot(n_rows, COLUMNS, i + 1, sharex=first)
        first = first or axes
        _histogram(axes, name, metrics)
    bottom.supxlabel("log10 of the share of tokens a feature fires on", fontsize=9)
    bottom.supylabel("features", fontsize=9)
    return figure


def _fidelity(axes: Axes, evaluation: Evaluation) -> None:
    sites = evaluation.sites.values()
    variance = [m.explained_variance for m in sites]
    recovered = [m.predictions.ce_recovered for m in sites]
    _bars(axes, list(evaluation.sites), ("explained variance", BLUE, variance), ("CE recovered", ORANGE, recovered))
    finite = [value for value in (*variance, *recovered) if math.isfinite(value)]
    axes.set_ylim(min(0.0, max(-0.5, min(finite, default=0.0))), 1.05)
    axes.axhline(1.0, color=RULE, lw=1, zorder=0)
    spliced = evaluation.spliced["all"]
    axes.set_title(
        f"each site alone; all spliced: CE {spliced.ce:.3f}, the model's own {evaluation.ce_model:.3f} "
        f"({evaluation.n_tokens:,} tokens)",
        fontsize=9,
        loc="left",
    )


def _cost(axes: Axes, evaluation: Evaluation) -> None:
    alone = [m.predictions.ce - evaluation.ce_model for m in evaluation.sites.values()]
    among = [evaluation.error_matters(name) for name in evaluation.sites]
    bars = [("this error dropped alone", BLUE, alone)]
    if any(map(math.isfinite, among)):
        bars.append(("while all others are dropped", ORANGE, among))
    _bars(axes, list(evaluation.sites), *bars)
    axes.axhline(0.0, color=RULE, lw=1, zorder=0)
    axes.set_title("what a site's error is worth to the model: CE added by dropping it", fontsize=9, loc="left")
    axes.set_ylabel("nats", fontsize=9)


def _bars(axes: Axes, sites: Sequence[str], *bars: Bars) -> None:
    """Bars beside each other at every site."""
    width = 0.8 / len(bars)
    for i, (label, colour, heights) in enumerate(bars):
        centres = [position + (i - (len(bars) - 1) / 2) * width for position in range(len(sites))]
        axes.bar(centres, list(heights), width=width, color=colour, label=label)
    axes.set_xticks(range(len(sites)), list(sites), rotation=45 if len(sites) > 8 else 0)
    axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False, ncols=2)
    quiet(axes)


def _histogram(axes: Axes, name: str, metrics: SiteMetrics) -> None:
    histogram = metrics.density_histogram
    width = histogram.edges[1] - histogram.edges[0]
    axes.bar(histogram.edges[:-1], histogram.counts, width=width, align="edge", color=PALE)
    axes.set_title(f"{name}  L0 {metrics.l0:.3g}, dead {metrics.dead_fraction:.0%}", fontsize=8)
    quiet(axes, size=7)
