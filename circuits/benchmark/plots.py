"""The suite of tasks as a picture: a panel a task, sites in the order of the forward pass.

1. Sparse probing: accuracy by site, a line a number of features, beside a probe of the whole activation.
2. SCR and TPP: score by number of features ablated, a line a site, darker ones later in the model.
3. Absorption and stability: bars by site.

Scores are means over data sets, whiskers their 95 % intervals over texts or words. SCR divides by what there is to be
gained, so that an interval of it can be wide beyond measure: a whisker ends in an arrow where it leaves the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from circuits.benchmark.results import SuiteReport
from sae._plotting import COLOURS, PALE, RULE, quiet, save_figure

if TYPE_CHECKING:
    import pandas as pd

Panel = Callable[[Axes], None]
CURVES = {"scr": "spurious correlation removal (SCR)", "tpp": "targeted probe perturbation (TPP)"}
BESIDE = 1.03
"""Factor between the places of two sites at the same number of features."""
BARS = {
    "feature absorption on first letters": ("full absorption", "absorbed fraction"),
    "features found again with another seed": ("similarity", "matched"),
}


def plot_suite(report: SuiteReport, path: str | Path) -> Path:
    """Write the picture as .png, .svg or .pdf."""
    return save_figure(suite_figure(report), path)


def suite_figure(report: SuiteReport) -> Figure:
    """The picture as a matplotlib figure: a panel for each task that was measured."""
    frame = _over_data_sets(report.to_frame())
    tasks = set(frame["task"])
    panels: list[Panel] = []
    if "probing" in tasks:
        panels.append(lambda axes: _probing(axes, report, frame))
    panels += [_curve_panel(frame, task, title) for task, title in CURVES.items() if task in tasks]
    panels += [_bar_panel(frame, names, title) for title, names in BARS.items() if tasks & set(names)]
    figure = Figure(figsize=(9.5, 2.8 * max(1, len(panels))), layout="constrained")
    for axes, draw in zip(figure.subplots(len(panels), squeeze=False)[:, 0] if panels else (), panels, strict=True):
        draw(axes)
        quiet(axes)
    return figure


def _over_data_sets(frame: pd.DataFrame) -> pd.DataFrame:
    """Means over data sets; deviations of independent means add up as squares."""
    frame = frame.assign(below=(frame["score"] - frame["low"]) ** 2, above=(frame["high"] - frame["score"]) ** 2)
    groups = frame.groupby(["task", "site", "size"], sort=False, dropna=False)
    table = groups.agg(score=("score", "mean"), below=("below", "sum"), above=("above", "sum"), n=("score", "size"))
    for side in ("below", "above"):
        table[side] = table[side] ** 0.5 / table["n"]
    return table.reset_index()


def _sites(axes: Axes, sites: Sequence[str]) -> None:
    axes.set_xticks(range(len(sites)), list(sites), rotation=45 if len(sites) > 8 else 0)


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)


def _probing(axes: Axes, report: SuiteReport, frame: pd.DataFrame) -> None:
    rows = frame[frame["task"] == "probing"]
    sites, sizes = list(dict.fromkeys(rows["site"])), sorted(rows["size"].unique())
    numbers = {site: number for number, site in enumerate(sites)}
    for i, size in enumerate(sizes):
        of_size = rows[rows["size"] == size]
        xs = [numbers[site] + 0.12 * (i - (len(sizes) - 1) / 2) for site in of_size["site"]]
        label = f"{size} feature{'s' if size > 1 else ''}"
        axes.errorbar(xs, of_size["score"], yerr=[of_size["below"], of_size["above"]], fmt="o", ms=4.5, lw=1.2,
                      color=COLOURS[i % len(COLOURS)], label=label)  # fmt: skip
    dense = [[entry.dense for entry in report.probing if entry.site == site] for site in sites]
    axes.plot(range(len(sites)), [sum(values) / len(values) for values in dense], "_", ms=22, color=PALE,
              label="whole activation")  # fmt: skip
    few = [[e.coordinates for e in report.probing if e.site == site and e.k == sizes[-1]] for site in sites]
    axes.plot(range(len(sites)), [sum(values) / len(values) for values in few], "x", ms=5, color=PALE,
              label=f"{sizes[-1]} coordinates")  # fmt: skip
    axes.axhline(0.5, color=RULE, lw=1, zorder=0)
    _sites(axes, sites)
    n = len({entry.data for entry in report.probing})
    axes.set_title(f"sparse probing: accuracy, mean over {n} data set{'s' if n > 1 else ''}", fontsize=9, loc="left")
    _legend(axes)


def _curve_panel(frame: pd.DataFrame, task: str, title: str) -> Panel:
    def draw(axes: Axes) -> None:
        rows = frame[frame["task"] == task].astype({"size": float})
        rows = rows.assign(low=rows["score"] - rows["below"].fillna(0), high=rows["score"] + rows["above"].fillna(0))
        low, high = _limits(rows)
        sites = list(dict.fromkeys(rows["site"]))
        for i, site in enumerate(sites):
            of_site = rows[rows["site"] == site].sort_values("size")
            colour = colormaps["viridis"](0.9 - 0.9 * i / max(1, len(sites) - 1))
            sizes, scores = of_site["size"] * BESIDE ** (i - (len(sites) - 1) / 2), of_site["score"]
            ends = of_site[["low", "high"]].to_numpy().T.clip(low, high)
            axes.errorbar(sizes, scores, yerr=abs(ends - scores.to_numpy()), fmt="o-", ms=3.5,
                          lw=1.3, elinewidth=0.8, color=colour, label=site)  # fmt: skip
            for end, marker in ((ends[0] <= low, "v"), (ends[1] >= high, "^")):
                axes.plot(
                    sizes[end], [low if marker == "v" else high] * end.sum(), marker, ms=5, color=colour, clip_on=False
                )
        axes.set_ylim(low, high)
        axes.axhline(0, color=RULE, lw=1, zorder=0)
        axes.set_xscale("log")
        axes.set_xticks(sorted(rows["size"].unique()))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("features ablated", fontsize=9)
        axes.set_title(title, fontsize=9, loc="left")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=7.5, frameon=False,
                    ncols=2 if len(sites) > 9 else 1)  # fmt: skip

    return draw


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Bounds of the vertical axis: zero, all scores, and whiskers up to as far again."""
    least, most = min(0.0, rows["score"].min()), max(0.0, rows["score"].max())
    span = most - least or 1.0
    low, high = max(rows["low"].min(), least - span), min(rows["high"].max(), most + span)
    return min(low, least) - 0.05 * span, max(high, most) + 0.05 * span


def _bar_panel(frame: pd.DataFrame, names: tuple[str, str], title: str) -> Panel:
    def draw(axes: Axes) -> None:
        rows = frame[frame["task"].isin(names)]
        sites = list(dict.fromkeys(rows["site"]))
        for i, name in enumerate(names):
            by_site = rows[rows["task"] == name].set_index("site").reindex(sites)
            xs = [number + 0.4 * i - 0.2 for number in range(len(sites))]
            errors = by_site[["below", "above"]] if by_site["below"].fillna(0).any() else None
            axes.bar(xs, by_site["score"], width=0.38, color=COLOURS[i], label=name,
                     yerr=None if errors is None else errors.to_numpy().T, error_kw={"lw": 1})  # fmt: skip
        axes.set_ylim(0, 1.02)
        _sites(axes, sites)
        axes.set_title(title, fontsize=9, loc="left")
        _legend(axes)

    return draw
