"""A sweep as pictures: fidelity against sparsity, one line an architecture and width.

1. `plot_site`: explained variance and CE recovered against L0 at one site, beside each other.
2. `plot_sites`: one of the two at all sites, a row a kind of site and a column a layer.
3. `plot_laws`: what is left unexplained against width, a row a site, with the scaling laws as lines.

Colour is the architecture; darker lines with fuller markers are wider dictionaries. Small points are single seeds,
lines go through their means. Points of one line are in the order of the k they were trained for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from sae._plotting import COLOURS, PALE, RULE, quiet, save_figure
from sae.architectures import architecture
from sae.evaluation.scaling import METRICS as SCALED
from sae.evaluation.scaling import NAMES, POWER, ScalingLaw, law_of
from sae.evaluation.sweep_results import SweepResults
from sae.model.sites import Site

if TYPE_CHECKING:
    import pandas as pd

METRICS = {"explained_variance": "explained variance", "ce_recovered": "CE recovered"}
MARKERS = ("o", "s", "^", "D", "v", "P")
COLUMNS = 6
"""Most panels in a row."""
FILLED = 0.7
"""Share of the panels that must not be blank for rows of one kind."""
LAWS = {"unexplained_variance": "1 − EV", "ce_lost": "1 − CE recovered", "dead_fraction": "dead features"}
"""Titles of the panels of scaling laws."""
ALONG = {"features": "features n", "k": "active features k", "tokens": "tokens T"}
SHORT = {"features": "n", "k": "k", "tokens": "T"}
LINE = ["architecture", "features"]
"""Columns that tell the lines of a picture apart."""
Styles = dict[tuple[str, int], dict[str, object]]


def plot_site(results: SweepResults, site: str, path: str | Path) -> Path:
    """Both measures at one site, as .svg, .png or .pdf."""
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    styles = _styles(results)
    for axes, metric in zip(figure.subplots(1, 2), METRICS, strict=True):
        _panel(axes, results, site, metric, styles, seeds=True)
        axes.set_xlabel("L0: active features a token", fontsize=9)
        axes.set_ylabel(METRICS[metric], fontsize=9)
    figure.suptitle(site, fontsize=11, fontweight="bold")
    figure.legend(handles=_handles(styles), loc="outside right center", frameon=False, fontsize=8)
    return save_figure(figure, path, overwrite=True)


def plot_sites(results: SweepResults, metric: str, path: str | Path) -> Path:
    """One measure at all sites, as .svg, .png or .pdf."""
    rows = _rows_of_sites(results.sites)
    n_columns = max(map(len, rows))
    by_kind = all(len({Site.parse(site).kind for site in row} - {"embed"}) <= 1 for row in rows)
    figure = Figure(figsize=(1.9 * n_columns + 1.8, 1.7 * len(rows) + 0.7), layout="constrained")
    styles = _styles(results)
    grid = figure.subplots(len(rows), n_columns, squeeze=False, sharey="row" if by_kind else False)
    for panels, sites in zip(grid, rows, strict=True):
        for axes, site in zip(panels, sites, strict=False):
            _panel(axes, results, site, metric, styles, seeds=False)
            axes.set_title(site, fontsize=9)
        for axes in panels[len(sites) :]:
            axes.set_axis_off()
    figure.supxlabel("L0: active features a token", fontsize=10)
    figure.supylabel(METRICS[metric], fontsize=10)
    figure.legend(handles=_handles(styles), loc="outside right center", frameon=False, fontsize=8)
    return save_figure(figure, path, overwrite=True)


def plot_laws(rows: pd.DataFrame, laws: Sequence[ScalingLaw], architecture: str, path: str | Path) -> Path:
    """The dictionaries of one architecture and the laws fitted to them, as .svg, .png or .pdf.

    Along is the width, or where there is only one the sparsity, else the tokens; colours tell the other two.
    """
    rows = rows[rows["architecture"] == architecture]
    along, *others = sorted(ALONG, key=lambda name: rows[name].nunique() < 2)
    sites = [site for site in dict.fromkeys(rows["site"]) if any(law.site == site for law in laws)]
    figure = Figure(figsize=(10.5, 2.5 * len(sites) + 0.5), layout="constrained")
    grid = figure.subplots(len(sites), len(LAWS), squeeze=False, sharex=True)
    for panels, site in zip(grid, sites, strict=True):
        for axes, (metric, title) in zip(panels, LAWS.items(), strict=True):
            law = law_of(laws, {"architecture": architecture, "site": site, "metric": metric})
            _law_panel(axes, rows[rows["site"] == site], law, metric, along, others)
            axes.set_title(f"{site}: {title}\n{_exponents(law)}", fontsize=8, loc="left")
    for axes in grid[-1]:
        axes.set_xlabel(ALONG[along], fontsize=9)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=8)
    return save_figure(figure, path, overwrite=True)


def _exponents(law: ScalingLaw | None) -> str:
    """The exponents of a law with their standard errors, and its error."""
    if law is None:
        return "too few points to fit"
    shown = [f"{NAMES[name]} {law.parameters[name]:.2f}±{law.errors[name]:.2f}"
             for name in POWER if name in law.parameters]  # fmt: skip
    return f"{', '.join(shown)}; error {law.error:.2g}"


def _law_panel(
    axes: Axes, rows: pd.DataFrame, law: ScalingLaw | None, metric: str, along: str, others: Sequence[str]
) -> None:
    """Points and the law of one number; a colour a sparsity, lighter for fewer tokens."""
    column = SCALED[metric]
    groups = list(rows.groupby(others, sort=True))
    hues = {value: i for i, value in enumerate(sorted(rows[others[0]].unique()))}
    shades = {value: i for i, value in enumerate(sorted(rows[others[1]].unique(), reverse=True))}
    for (first, second), group in groups:
        pale = 0.6 * shades[second] / max(1, len(shades) - 1)
        colour = tuple(channel + pale * (1 - channel) for channel in to_rgb(COLOURS[hues[first] % len(COLOURS)]))
        values = group[column] if metric == column else 1 - group[column]
        told = [f"{SHORT[name]} {value:,}" for name, value in zip(others, (first, second), strict=True)
                if rows[name].nunique() > 1]  # fmt: skip
        axes.plot(group[along], values, "o", ms=4, color=colour, label=", ".join(told) or "measured")
        if law is not None:
            x = np.geomspace(float(rows[along].min()), float(rows[along].max()), 60)
            at = {along: x, others[0]: np.full_like(x, first), others[1]: np.full_like(x, max(second, 1))}
            axes.plot(x, law(at["features"], at["k"], at["tokens"]), lw=1.2, color=colour)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(rows[along].unique()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    if metric != column and (rows[column] < 1).any():
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    quiet(axes, size=7.5)


def _rows_of_sites(sites: Sequence[str]) -> list[list[str]]:
    """Rows of at most `COLUMNS` sites: a kind each, the embedding before the residual stream; mixed where that is
    mostly blank.
    """
    kinds: dict[str, list[str]] = {}
    for site in sites:
        kind = Site.parse(site).kind
        kinds.setdefault("resid" if kind == "embed" else kind, []).append(site)
    rows = [row for members in kinds.values() for row in _even_rows(members, COLUMNS)]
    if len(sites) < FILLED * len(rows) * max(map(len, rows)):
        rows = _even_rows(sites, min(COLUMNS, math.ceil(math.sqrt(2 * len(sites)))))
    return rows


def _even_rows(sites: Sequence[str], most: int) -> list[list[str]]:
    """Split sites into the fewest rows of at most `most`, of nearly equal length."""
    length = math.ceil(len(sites) / math.ceil(len(sites) / most))
    return [list(sites[i : i + length]) for i in range(0, len(sites), length)]


def _styles(results: SweepResults) -> Styles:
    """How each line is drawn: colour by architecture, lightness and marker by width."""
    lines = list(dict.fromkeys((row.architecture, row.features) for row in results.rows))
    architectures = [name for name in dict.fromkeys(name for name, _ in lines) if architecture(name).trained]
    widths = sorted({width for name, width in lines if name in architectures})
    styles: Styles = {}
    for name, width in lines:
        if name not in architectures:
            styles[name, width] = {"color": PALE, "marker": "x"}
            continue
        rank = widths.index(width)
        lightness = 0.55 * (len(widths) - 1 - rank) / max(1, len(widths) - 1)
        colour = COLOURS[architectures.index(name) % len(COLOURS)]
        mixed = tuple(channel + lightness * (1 - channel) for channel in to_rgb(colour))
        styles[name, width] = {"color": mixed, "marker": MARKERS[rank % len(MARKERS)]}
    return styles


def _handles(styles: Styles) -> list[Line2D]:
    return [
        Line2D([], [], label=f"{name} {width:,}", lw=1.6, ms=4.5, **style)  # type: ignore[arg-type]
        for (name, width), style in styles.items()
    ]


def _panel(
    axes: Axes,
    results: SweepResults,
    site: str,
    metric: str,
    styles: Styles,
    *,
    seeds: bool,
) -> None:
    """All lines of a site."""
    frame = results.to_frame().query("site == @site")
    for line, rows in frame.groupby(LINE, sort=False):
        means = rows.groupby("k")[["l0", metric]].mean()
        axes.plot(means["l0"], means[metric], lw=1.4, ms=4, **styles[line])  # type: ignore[arg-type]
        if seeds:
            points = rows[rows.groupby("k")["k"].transform("size") > 1]
            axes.scatter(points["l0"], points[metric], s=5, color=styles[line]["color"], lw=0)  # type: ignore[arg-type]
    low, high = axes.get_ylim()
    if high > 0.97 and math.isfinite(low):
        axes.axhline(1, color=RULE, lw=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(sorted(frame["k"].unique()))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    quiet(axes)
