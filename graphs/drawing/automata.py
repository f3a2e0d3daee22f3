"""Automata of features as a picture: a box an automaton, a node a state, an arrow a transition.

Graphviz lays them out, from left to right. An arrow is as thick as the effect it stands for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import graphviz

from graphs._files import atomic_write, marked
from graphs._outputs import check_output, has_mark
from graphs.drawing.graphviz import run_graphviz
from graphs.drawing.scene import html_text, quoted
from graphs.drawing.style import INK, PALE_INK, PLAIN_EDGE, RULE, fit, visible

FONT = "DejaVu Sans"
NAME_WIDTH = 150.0
"""Longest line in a state, in points."""


@dataclass(frozen=True)
class Way:
    """A transition between two states."""

    source: str
    """Name of the state that it leaves."""
    target: str
    """Name of the state that it leads to."""
    effect: float
    """How strong it is, from 0 to 1."""
    words: str
    """Words at the arrow."""
    tooltip: str
    """What a viewer shows when the mouse rests on it."""


@dataclass(frozen=True)
class Machine:
    """An automaton to draw."""

    title: str
    """Heading."""
    states: dict[str, tuple[str, str]]
    """Name of each state, such as resid_3/120 -> its label, empty where it has none, and the tokens it is on."""
    ways: list[Way]
    """Its transitions."""


def draw_automata(machines: Sequence[Machine], path: str | Path, *, overwrite: bool = False) -> Path:
    """Draw automata into an .svg, .png or .pdf file, one below the other.

    Args:
        machines: The automata; where there are none, the picture says so.
        path: The file; the extension decides.
        overwrite: Whether a file is replaced that this program did not write.

    Returns:
        The path.

    Raises:
        GraphError: For a file that cannot be written or is another program's.
    """
    path = Path(path)
    kind = path.suffix.lower()
    check_output(path, has_mark(kind), overwrite=overwrite)
    drawing = run_graphviz(_source(machines), kind[1:], size=2000, details={}, program="dot")
    with atomic_write(path) as temporary:
        temporary.write_bytes(marked(drawing, kind))
    return path


def _source(machines: Sequence[Machine]) -> str:
    dot = graphviz.Digraph("automata")
    dot.attr(
        "graph", rankdir="LR", bgcolor="white", fontname=FONT, pad="0.15", nodesep="0.25", ranksep="0.5", tooltip=" "
    )
    dot.attr(
        "node", shape="box", style="rounded,filled", fillcolor="white", color=RULE, fontname=FONT, margin="0.1,0.05"
    )
    dot.attr("edge", fontname=FONT, color=PLAIN_EDGE, arrowsize="0.7")
    if not machines:
        dot.node("none", f"<{html_text('no feature makes another come next through the predictions', 10, PALE_INK)}>")
    for number, machine in reversed(list(enumerate(machines))):  # Graphviz puts the first one lowest
        with dot.subgraph(name=f"cluster_{number}") as box:
            title = html_text(machine.title, 10, PALE_INK, bold=True)
            box.attr(label=f"<{title}>", labeljust="l", bgcolor="#f5f6f8", pencolor="#f5f6f8", margin="12", tooltip=" ")
            for name, (label, words) in machine.states.items():
                box.node(
                    f"{number}:{name}".replace(":", "-"),
                    f"<{_state(name, label, words)}>",
                    tooltip=quoted(f"{name} {label} {words}"),
                )
            for way in machine.ways:
                ends = (f"{number}-{name}" for name in (way.source, way.target))
                width, words = f"{0.6 + 3.4 * min(1.0, way.effect):.2f}", html_text(visible(way.words), 8, PALE_INK)
                told = quoted(way.tooltip)
                box.edge(*ends, label=f"<{words}>", penwidth=width, tooltip=told, labeltooltip=told)
    return dot.source


def _state(name: str, label: str, words: str) -> str:
    """The lines of a state: its label or else its tokens, then what is less important."""
    head, below = (label, f"{name}: {words}") if label else (words, name)
    lines = [
        html_text(fit(visible(head), 10, NAME_WIDTH), 10, INK),
        html_text(fit(visible(below), 8, NAME_WIDTH), 8, PALE_INK),
    ]
    return "<BR/>".join(lines)
