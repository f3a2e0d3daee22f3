"""The faithfulness plot as an inline SVG that takes its colours from the page."""

from __future__ import annotations

import io
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

COLOURS = {"#010101": "--ink", "#020202": "--pale", "#030303": "--rule", "#040404": "--pos", "#050505": "--neg"}
"""Stand-ins drawn by matplotlib -> the page's variables, which differ in light and dark mode."""
INK, PALE, RULE, CIRCUIT, COMPLEMENT = COLOURS


def faithfulness_plot(data: dict[str, Any]) -> str:
    """Faithfulness and completeness over circuit size, with the range of random circuits; labels stand at the lines."""
    sizes, random = data["sizes"], data.get("random") or []
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 10, "font.family": "sans-serif"}):
        figure = Figure(figsize=(6.2, 3.7), layout="constrained")
        axes = figure.subplots()
        for level in (0, 1):
            axes.axhline(level, color=RULE, lw=1, zorder=0)
        if random:
            columns = list(zip(*random, strict=True))
            axes.fill_between(sizes, [min(c) for c in columns], [max(c) for c in columns], color=PALE, alpha=0.25, lw=0)
            axes.plot(sizes, [sum(c) / len(c) for c in columns], color=PALE, lw=1.2, ls=(0, (3, 2)))
        axes.plot(sizes, data["completeness"], color=COMPLEMENT, lw=1.8, marker="o", ms=4)
        axes.plot(sizes, data["faithfulness"], color=CIRCUIT, lw=2.2, marker="o", ms=5)
        ends = [
            (data["faithfulness"][-1], "only the circuit", CIRCUIT),
            (data["completeness"][-1], "all but the circuit", COMPLEMENT),
        ]
        if random:
            ends.append((sum(curve[-1] for curve in random) / len(random), "random nodes", PALE))
        low, high = axes.get_ylim()
        for y, (_, label, colour) in zip(_apart([end[0] for end in ends], 0.07 * (high - low)), ends, strict=True):
            axes.annotate(
                label,
                (sizes[-1], y),
                (8, 0),
                textcoords="offset points",
                color=colour,
                va="center",
                annotation_clip=False,
            )
        axes.set_xscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("nodes", color=INK)
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
    svg = svg[svg.index("<svg") :]
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    return f'<figure class="plot">{svg}</figure>'
