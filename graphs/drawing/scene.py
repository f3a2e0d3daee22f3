"""The frame of a drawing: its layout, sizes that go with the number of nodes, and columns, title and legend around the
graph.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from html import escape

import graphviz

from graphs.classes import Classes, find_classes
from graphs.drawing.layout import Cell, Layout, Point, layered_layout
from graphs.drawing.style import (
    DIVERGING,
    INK,
    NEGATIVE_EDGE,
    PALE_INK,
    PLAIN_EDGE,
    POSITIVE_EDGE,
    count,
    fit,
    largest_effect,
    largest_weight,
    number,
    position_name,
    span_words,
    text_width,
    visible,
)
from graphs.errors import GraphError
from graphs.feature_graph import OTHERS, FeatureGraph
from graphs.schema import Colour

GUTTER, MARGIN, SPACE = 62.0, 14.0, 14.0
OUTLINE = 3.5
"""Between the boxes of a supernode and its outline."""


@dataclass(frozen=True)
class Density:
    """Sizes that go with a number of nodes."""

    up_to: int
    """The largest number of nodes drawn this way."""
    cell: Cell
    """Room for one node, in points."""
    lines: int
    """Lines of label text."""
    label: float
    """Font size of the label."""
    small: float
    """Font size of id and effect."""
    space: float
    """Free height between sites."""
    labelled: int
    """How many of the strongest nodes keep their label."""


DENSITIES = (
    Density(14, Cell(width=158, height=50, gap=26, box=142), 2, 11.0, 8.5, 34, 10**6),
    Density(48, Cell(width=132, height=46, gap=24, box=118), 2, 10.0, 8.0, 28, 10**6),
    Density(130, Cell(width=106, height=29, gap=18, box=93), 1, 8.5, 7.0, 24, 10**6),
    Density(10**9, Cell(width=88, height=24, gap=14, box=77), 1, 7.0, 6.0, 20, 80),
)
PORTRAIT = Density(10**9, Cell(width=132, height=40, gap=12, box=120), 2, 10.0, 8.0, 20, 10**6)
"""For a column of text and a sheet of paper, whatever the number of nodes."""


@dataclass(frozen=True)
class Scene:
    """The scales and colours that all parts of the drawing share."""

    graph: FeatureGraph
    """The graph."""
    layout: Layout
    """Its layout."""
    density: Density
    """How large it is."""
    labelled: frozenset[str]
    """Ids of the nodes that show a label."""
    link: str
    """Template of the nodes' hyperlinks, `#node-{id}`."""
    effect: float
    """The largest |effect|, where the colour scale ends."""
    weight: float
    """The largest |weight|, drawn with the widest line."""
    classes: Classes | None
    """The classes of prompts that colours stand for; None where they stand for effects."""

    def point(self, x: float, y: float) -> Point:
        """From layout to page: room for the site names on the left, for legend and header below."""
        return x + GUTTER + MARGIN + (self.size[0] - self.layout.width - GUTTER - 2 * MARGIN) / 2, y + self.below

    @property
    def below(self) -> float:
        """Height under the first site: legend, and the tokens of a circuit by position."""
        return 66.0 + (24.0 if self.layout.columns else 0.0)

    @property
    def size(self) -> Point:
        """Width and height of the page."""
        above = 58.0 + (24.0 if self.layout.columns else 0.0)
        return max(self.layout.width + GUTTER + 2 * MARGIN, 590.0), self.layout.height + self.below + above


def make_scene(graph: FeatureGraph, link: str, colour: Colour = "class", *, portrait: bool = False) -> Scene:
    """Layout and sizes of a drawing of the graph.

    link: template of the nodes' hyperlinks; colour: what colours stand for, effects where no class is known;
    portrait: whether it is taller than wide.
    """
    if len(graph) == 0:
        raise GraphError("the graph has no nodes: there is nothing to draw")
    n_nodes = sum(node.kind != "metric" for node in graph.nodes())
    density = PORTRAIT if portrait else next(density for density in DENSITIES if n_nodes <= density.up_to)
    strongest = sorted(graph.nodes(), key=lambda node: -abs(node.effect))[: density.labelled]
    metric = (density.cell.box * 1.7, 2.6 * density.label + 1.4 * density.small + 12)
    shape: dict[str, float] = {"aspect": 0.62, "lane_space": 8.0, "padding": 3.0} if portrait else {}
    if any(len(ids) > 1 for ids in graph.supernodes.values()):  # their outlines and names need room above each row
        name = OUTLINE + 1.25 * density.small
        density = replace(density, cell=replace(density.cell, gap=max(density.cell.gap, name + OUTLINE + 3)))
        shape["padding"] = name + 1
    layout = layered_layout(graph, cell=density.cell, metric=metric, space=density.space, **shape)  # type: ignore[arg-type]
    labelled = frozenset(node.id for node in strongest)
    classes = find_classes(graph) if colour == "class" else None
    return Scene(graph, layout, density, labelled, link, largest_effect(graph), largest_weight(graph), classes)


# --- around the graph ------------------------------------------------------------------------------------------------


def html_text(text: str, size: float, colour: str, *, bold: bool = False) -> str:
    """A run of text in Graphviz's HTML-like labels."""
    # Graphviz would replace \\N by the node's name, \\G by the graph's and so on: part the two characters invisibly.
    text = re.sub(r"\\(?=[NGETHL])", "\\\\\u200b", text)
    words = escape(text, quote=False) or " "
    words = f"<B>{words}</B>" if bold else words
    return f'<FONT POINT-SIZE="{size:g}" COLOR="{colour}">{words}</FONT>'


def quoted(text: str) -> str:
    """Text that DOT must take literally: backslashes doubled, control characters shown, never read as HTML."""
    return graphviz.nohtml(graphviz.escape(visible(text)))


def add_columns(dot: graphviz.Digraph, scene: Scene) -> None:
    """The tokens above and below their columns, and a thin line between columns."""
    if not scene.layout.columns:
        return
    bottom = scene.layout.bands[0].bottom if scene.layout.bands else 0.0
    top = scene.layout.bands[-1].top if scene.layout.bands else 0.0
    for index, column in enumerate(scene.layout.columns):
        name = fit(position_name(scene.graph, column.position), 11, column.right - column.left - 6, bold=True)
        middle = (column.left + column.right) / 2
        _add_text(dot, scene, f"column-{index}-below", html_text(name, 11, INK, bold=True), (middle, bottom - 14))
        above = scene.size[1] - scene.below - 56
        _add_text(dot, scene, f"column-{index}-above", html_text(name, 11, INK, bold=True), (middle, above))
        words = fit(span_words(scene.graph, column.position), 8.5, column.right - column.left - 6)
        if words:
            _add_text(dot, scene, f"column-{index}-words", html_text(words, 8.5, PALE_INK), (middle, above - 14))
        if index:
            x, y = scene.point(column.left, (bottom + top) / 2)
            size = {"width": "0.004", "height": f"{(top - bottom) / 72:.3f}", "label": "", "tooltip": " "}
            dot.node(f"rule-{index}", pos=f"{x:.1f},{y:.1f}", shape="box", color="#dfe3e9", penwidth="0.5", **size)


def add_title(dot: graphviz.Digraph, scene: Scene, title: str | None) -> None:
    width, height = scene.size
    metadata = scene.graph.metadata
    title = visible(str(title if title is not None else metadata.get("title") or ""))
    features = sum(node.kind == "feature" for node in scene.graph.nodes())
    errors, skips = (sum(node.kind == kind for node in scene.graph.nodes()) for kind in OTHERS)
    counted = [(features, "feature"), (errors, "error"), (len(scene.graph.edges()), "edge")]
    counted[2:2] = [(skips, "skip connection")] if skips else []
    facts = " · ".join(count(n, noun) for n, noun in counted)
    if isinstance(metadata.get("method"), str):
        facts += f" · {visible(metadata['method'])}"
    middle = scene.layout.width / 2 - GUTTER / 2
    heading = html_text(fit(title, 14, width - 40, bold=True), 14, INK, bold=True) if title else ""
    _add_text(dot, scene, "title", heading, (middle, height - scene.below - 18))
    _add_text(
        dot, scene, "facts", html_text(fit(facts, 9, width - 40), 9, PALE_INK), (middle, height - scene.below - 36)
    )


def add_legend(dot: graphviz.Digraph, scene: Scene) -> None:
    """Colour scale with its ends in words, the signs of nodes, and edges: in one row, or in two where it is narrow."""
    scale, signs, width = _legend(scene)
    rows = [("legend", scale + signs, 26)]
    if width > scene.size[0] - 2 * MARGIN:
        rows = [("legend", scale, 34), ("legend-signs", signs, 16)]
    for name, cells, height in rows:
        table = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="1"><TR>{cells}</TR></TABLE>'
        _add_text(dot, scene, name, table, (scene.layout.width / 2 - GUTTER / 2, height - scene.below))


def _legend(scene: Scene) -> tuple[str, str, float]:
    """The cells of the colour scale, those of the signs, and how wide they are together."""
    kinds = {node.kind for node in scene.graph.nodes()}
    if scene.classes is not None:
        low, high = (f"on for {visible(fit(name, 8.5, 150))}" for name in scene.classes.names)
        signs = [("▬", PALE_INK, f"|effect|, the longest {number(scene.effect).lstrip('+')}")]
    else:
        low, high = f"lowers the metric  {number(-scene.effect)}", f"{number(scene.effect)}  raises the metric"
        signs = []
    signs += [("▲", PALE_INK, "SAE error")]
    signs += [("◆", PALE_INK, "skip connection")] if "skip" in kinds else []
    if scene.weight:
        signs += [("━", PLAIN_EDGE, f"edge, widest {number(scene.weight).lstrip('+')}")]
    if any("exact_effect" in node.attributes for node in scene.graph.nodes()):
        signs += [("✓", PALE_INK, "patched alone")]
    swatches = "".join(f'<TD BGCOLOR="{colour}" WIDTH="18" HEIGHT="9" FIXEDSIZE="TRUE"></TD>' for colour in DIVERGING)
    scale = f"<TD>{html_text(low, 8.5, INK)}  </TD>{swatches}<TD>  {html_text(high, 8.5, INK)}</TD>"
    cells = ""
    for sign, colour, words in signs:
        mark = html_text(sign, 11 if sign == "━" else 9, colour)
        if sign == "━" and scene.classes is None:
            mark = html_text(sign, 11, NEGATIVE_EDGE) + html_text(sign, 11, POSITIVE_EDGE)
        cells += f"<TD>     {mark} {html_text(words, 8.5, INK)}</TD>"
    texts = [low, high, *(f"     {sign} {words}" for sign, _, words in signs)]
    return scale, cells, sum(text_width(text, 8.5) + SPACE for text in texts) + 18 * len(DIVERGING)


def _add_text(dot: graphviz.Digraph, scene: Scene, name: str, html: str, at: Point) -> None:
    x, y = scene.point(*at)
    label = f"<{html}>" if html else ""
    dot.node(name, label, id=name, shape="plaintext", fixedsize="false", pos=f"{x:.1f},{y:.1f}", tooltip=" ")
