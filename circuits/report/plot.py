"""Faithfulness curves as an inline SVG that takes its colours from the page."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"#010101": "--ink", "#020202": "--pale", "#030303": "--rule", "#040404": "--pos", "#050505": "--neg"}
"""Stand-ins drawn by matplotlib -> the page's variables, which differ in light and dark mode."""
INK, PALE, RULE, CIRCUIT, COMPLEMENT = COLOURS
FAR = 1e6
"""Shares beyond this have no meaning, and cannot all be drawn."""
ROLES = {"circuit": CIRCUIT, "complement": COMPLEMENT}


class Line(NamedTuple):
    """A line of the plot."""

    values: Sequence[float | None]
    """One a size; None where it is not defined."""
    label: str
    """Label at its end."""
    role: str
    """`circuit` or `complement`, which sets the colour."""
    bounds: Sequence[Sequence[float | None]] = ()
    """The interval of each value, drawn as a band."""


def curves_plot(
    sizes: Sequence[int],
    curves: Sequence[Line],
    *,
    unit: str,
    random: Sequence[Sequence[float | None]] = (),
    level: float | None = None,
) -> Markup:
    """An `<svg>` element: curves over sizes of what `unit` counts, with the range of random sets and a dashed level.

    Labels stand at the lines. What is beyond `FAR` is drawn there.
    """
    lines = [curve._replace(values=_drawn(curve.values)) for curve in curves]
    draws = [_drawn(values) for values in random]
    salt = "".join([unit, *(curve.label for curve in curves)])  # ids are unique on the page, and the same every time
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.2, 3.7), layout="constrained")
        axes = figure.subplots()
        for height in (0, 1):
            axes.axhline(height, color=RULE, lw=1, zorder=0)
        ends = [(_last(curve.values), curve.label, ROLES[curve.role]) for curve in lines]
        if level is not None:
            level = _drawn([level])[0]
            axes.axhline(level, color=PALE, lw=1, ls=(0, (3, 2)), zorder=0)
            ends.append((level, "all nodes joined", PALE))
        if draws:
            columns = np.array(draws)
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of columns without a number
                low, high, mean = np.nanmin(columns, 0), np.nanmax(columns, 0), np.nanmean(columns, 0)
            axes.fill_between(sizes, low, high, color=PALE, alpha=0.25, lw=0)
            axes.plot(sizes, mean, color=PALE, lw=1.2, ls=(0, (3, 2)))
            ends.append((_last(mean), f"random {unit}", PALE))
        for curve in reversed(lines):
            if curve.bounds:
                low, high = zip(*map(_drawn, curve.bounds), strict=True)
                axes.fill_between(sizes, low, high, color=ROLES[curve.role], alpha=0.18, lw=0)
            width = {"circuit": 2.2, "complement": 1.8}[curve.role]
            axes.plot(sizes, curve.values, color=ROLES[curve.role], lw=width, marker="o", ms=2.3 * width)
        low, high = axes.get_ylim()
        for y, (_, label, colour) in zip(_apart([end[0] for end in ends], 0.07 * (high - low)), ends, strict=True):
            axes.annotate(
                label, (sizes[-1], y), (8, 0), textcoords="offset points", color=colour, va="center",
                annotation_clip=False,
            )  # fmt: skip
        _label_axes(axes, sizes, unit)
        return _inline(figure)


def doses_plot(scales: Sequence[float], left: Sequence[float | None], costs: Sequence[float | None]) -> Markup:
    """An `<svg>` element: what an edit leaves of the behaviour, and costs elsewhere, over its strength."""
    panels = [(left, "share of the behaviour left", CIRCUIT), (costs, "cross-entropy elsewhere, nats", COMPLEMENT)]
    panels = [panel for panel in panels if len(panel[0])]
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "doses", "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(3.1 * len(panels), 2.3), layout="constrained")
        for axes, (values, label, colour) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            axes.axhline(0, color=RULE, lw=1, zorder=0)
            axes.plot(scales, _drawn(values), color=colour, lw=2, marker="o", ms=4)
            axes.set_xlabel("strength", color=INK)
            axes.set_title(label, color=INK, fontsize=10, loc="left")
            axes.tick_params(colors=PALE, length=3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.spines[["left", "bottom"]].set_color(RULE)
        return _inline(figure)


def _label_axes(axes: Axes, sizes: Sequence[int], unit: str) -> None:
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(unit, color=INK)
    axes.set_ylabel("share of the behaviour", color=INK)
    axes.tick_params(colors=PALE, length=3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(RULE)


def _drawn(values: Sequence[float | None]) -> list[float]:
    """Values as they are drawn: not at all where they are None, and at `FAR` beyond it."""
    return [math.nan if value is None else max(-FAR, min(FAR, value)) for value in values]


def _last(values: Sequence[float | None]) -> float:
    """The last value that is one, where a line's label stands; 0 where there is none."""
    return next((value for value in reversed(values) if value is not None and math.isfinite(value)), 0.0)


def _apart(wanted: list[float], step: float) -> list[float]:
    """The wanted heights, moved up where one would stand closer than `step` above another."""
    placed: dict[int, float] = {}
    last = float("-inf")
    for index in sorted(range(len(wanted)), key=wanted.__getitem__):
        last = max(wanted[index], last + step)
        placed[index] = last
    return [placed[index] for index in range(len(wanted))]


def _inline(figure: Figure) -> Markup:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # of groups; they would repeat on the page
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return Markup(svg)
