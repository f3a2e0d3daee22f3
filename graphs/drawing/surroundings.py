"""What stands around the graph in a drawing: columns, title and legend."""

from __future__ import annotations

import re
from html import escape

import graphviz

from graphs.drawing.layout import Point
from graphs.drawing.scene import GUTTER, Scene
from graphs.drawing.style import (
    DIVERGING,
    INK,
    NEGATIVE_EDGE,
    PALE_INK,
    PLAIN_EDGE,
    POSITIVE_EDGE,
    count,
    fit,
    number,
    position_name,
    span_words,
    visible,
)


def html_text(text: str, size: float, colour: str, *, bold: bool = False) -> str:
    """A run of text in Graphviz's HTML-like labels."""
    # Graphviz would replace \\N by the node's name, \\G by the graph's and so on: part the two characters invisibly.
    text = re.sub(r"\\(?=[NGETHL])", "\\\\\u200b", text)
    words = escape(text, quote=False) or " "
    words = f"<B>{words}</B>" if bold else words
    return f'<FONT POINT-SIZE="{size:g}" COLOR="{colour}">{words}</FONT>'


def add_columns(dot: graphviz.Digraph, scene: Scene) -> None:
    """The tokens above and below their columns, and a thin line between columns."""
    if not scene.layout.columns:
        return
    bottom = scene.layout.bands[0].bottom if scene.layout.bands else 0.0
    top = scene.layout.bands[-1].top if scene.layout.bands else 0.0
    for place, column in enumerate(scene.layout.columns):
        name = fit(position_name(scene.graph, column.position), 11, column.right - column.left - 6, bold=True)
        middle = (column.left + column.right) / 2
        _add_text(dot, scene, f"column-{place}-below", html_text(name, 11, INK, bold=True), (middle, bottom - 14))
        above = scene.size[1] - scene.below - 56
        _add_text(dot, scene, f"column-{place}-above", html_text(name, 11, INK, bold=True), (middle, above))
        words = fit(span_words(scene.graph, column.position), 8.5, column.right - column.left - 6)
        if words:
            _add_text(dot, scene, f"column-{place}-words", html_text(words, 8.5, PALE_INK), (middle, above - 14))
        if place:
            x, y = scene.point(column.left, (bottom + top) / 2)
            size = {"width": "0.004", "height": f"{(top - bottom) / 72:.3f}", "label": "", "tooltip": " "}
            dot.node(f"rule-{place}", pos=f"{x:.1f},{y:.1f}", shape="box", color="#dfe3e9", penwidth="0.5", **size)


def add_title(dot: graphviz.Digraph, scene: Scene, title: str | None) -> None:
    width, height = scene.size
    metadata = scene.graph.metadata
    title = visible(str(title if title is not None else metadata.get("title") or ""))
    features = sum(node.kind == "feature" for node in scene.graph.nodes())
    errors = sum(node.kind == "error" for node in scene.graph.nodes())
    counted = ((features, "feature"), (errors, "error"), (len(scene.graph.edges()), "edge"))
    facts = " · ".join(count(n, thing) for n, thing in counted)
    if isinstance(metadata.get("method"), str):
        facts += f" · {visible(metadata['method'])}"
    middle = scene.layout.width / 2 - GUTTER / 2
    heading = html_text(fit(title, 14, width - 40, bold=True), 14, INK, bold=True) if title else ""
    _add_text(dot, scene, "title", heading, (middle, height - scene.below - 18))
    _add_text(
        dot, scene, "facts", html_text(fit(facts, 9, width - 40), 9, PALE_INK), (middle, height - scene.below - 36)
    )


def add_legend(dot: graphviz.Digraph, scene: Scene) -> None:
    """Colour scale with its ends in numbers, the triangle, and edge signs."""
    swatches = "".join(f'<TD BGCOLOR="{colour}" WIDTH="18" HEIGHT="9" FIXEDSIZE="TRUE"></TD>' for colour in DIVERGING)
    if scene.classes is not None:
        low, high = (html_text(f"on for {visible(fit(name, 8.5, 150))}", 8.5, INK) for name in scene.classes.names)
        cells = f"<TD>{low}  </TD>{swatches}<TD>  {high}</TD>"
        longest = f"|effect|, the longest {number(scene.effect).lstrip('+')}"
        cells += f"<TD>     {html_text('▬', 8.5, PALE_INK)} {html_text(longest, 8.5, INK)}</TD>"
    else:
        low, high = (html_text(words, 8.5, INK) for words in ("lowers the metric", "raises the metric"))
        values = [html_text(number(value), 8.5, PALE_INK) for value in (-scene.effect, scene.effect)]
        cells = f"<TD>{low}  {values[0]} </TD>{swatches}<TD> {values[1]}  {high}</TD>"
    cells += f"<TD>     {html_text('▲', 9, PALE_INK)} {html_text('SAE error', 8.5, INK)}</TD>"
    lines = html_text("━", 11, NEGATIVE_EDGE) + html_text("━", 11, POSITIVE_EDGE)
    lines = lines if scene.classes is None else html_text("━", 11, PLAIN_EDGE)
    widest = f"edge, widest {number(scene.weight).lstrip('+')}"
    cells += f"<TD>     {lines} {html_text(widest, 8.5, INK)}</TD>" if scene.weight else ""
    if any("exact_effect" in node.attributes for node in scene.graph.nodes()):
        cells += f"<TD>     {html_text('✓', 8.5, PALE_INK)} {html_text('measured by patching it alone', 8.5, INK)}</TD>"
    table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1"><TR>{cells}</TR></TABLE>'
    _add_text(dot, scene, "legend", table, (scene.layout.width / 2 - GUTTER / 2, 26 - scene.below))


def _add_text(dot: graphviz.Digraph, scene: Scene, name: str, html: str, at: Point) -> None:
    x, y = scene.point(*at)
    label = f"<{html}>" if html else ""
    dot.node(name, label, id=name, shape="plaintext", fixedsize="false", pos=f"{x:.1f},{y:.1f}", tooltip=" ")
