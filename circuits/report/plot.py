"""Faithfulness curves as an inline SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = {"#010101": "--ink", "#020202": "--pale", "#030303": "--rule", "#040404": "--pos", "#050505": "--neg"}
"""Stand-ins drawn by matplotlib -> the page's variables, which differ in light and dark mode."""
INK, PALE, RULE, CIRCUIT, COMPLEMENT = COLOURS
ROLES = {"circuit": CIRCUIT, "complement": COMPLEMENT}


class Curve(NamedTuple):
    """A line of the plot."""

    values: Sequence[float]
    """One a size."""
    label: str
    """What stands at its end."""
    role: str
    """`circuit` or `complement`, which sets the colour."""


def curves_plot(
    sizes: Sequence[int],
    curves: Sequence[Curve],
    *,
    unit: str,
    random: Sequence[Sequence[float]] = (),
    level: float | None = None,
) -> str:
    """Curves over sizes of what `unit` counts, with the range of random sets and a dashed level; labels stand at the
    lines.
    """
    salt = "".join([unit, *(curve.label for curve in curves)])  # ids are unique on the page, and the same every time
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.2, 3.7), layout="constrained")
        axes = figure.subplots()
        for height in (0, 1):
            axes.axhline(height, color=RULE, lw=1, zorder=0)
        ends = [(curve.values[-1], curve.label, ROLES[curve.role]) for curve in curves]
        if level is not None:
            axes.axhline(level, color=PALE, lw=1, ls=(0, (3, 2)), zorder=0)
            ends.append((level, "all nodes joined", PALE))
        if random:
            columns = list(zip(*random, strict=True))
            axes.fill_between(sizes, [min(c) for c in columns], [max(c) for c in columns], color=PALE, alpha=0.25, lw=0)
            axes.plot(sizes, [sum(c) / len(c) for c in columns], color=PALE, lw=1.2, ls=(0, (3, 2)))
            ends.append((sum(curve[-1] for curve in random) / len(random), f"random {unit}", PALE))
        for curve in reversed(curves):
            width = {"circuit": 2.2, "complement": 1.8}[curve.role]
            axes.plot(sizes, curve.values, color=ROLES[curve.role], lw=width, marker="o", ms=2.3 * width)
        low, high = axes.get_ylim()
        for y, (_, label, colour) in zip(_apart([end[0] for end in ends], 0.07 * (high - low)), ends, strict=True):
            axes.annotate(
                label, (sizes[-1], y), (8, 0), textcoords="offset points", color=colour, va="center",
                annotation_clip=False,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel(unit, color=INK)
        axes.set_ylabel("share of the behaviour", color=INK)
        axes.tick_params(colors=PALE, length=3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(RULE)
        return _inline(figure)


def _apart(wanted: list[float], step: float) -> list[float]:
    """The wanted heights, moved up where one would stand closer than `step` above another."""
    placed: dict[int, float] = {}
    last = float("-inf")
    for index in sorted(range(len(wanted)), key=wanted.__getitem__):
        last = max(wanted[index], last + step)
        placed[index] = last
    return [placed[index] for index in range(len(wanted))]


def _inline(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg[svg.index("<svg") :])  # of groups; they would repeat on the page
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return f'<figure class="plot">{svg}</figure>'
