"""What every part of a drawing needs to know: the layout, and sizes that go with the number of nodes."""

from __future__ import annotations

from dataclasses import dataclass

from graphs.classes import Classes, find_classes
from graphs.drawing.layout import Cell, Layout, Point, layered_layout
from graphs.drawing.style import largest_effect, largest_weight
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph
from graphs.schema import Colour

GUTTER, MARGIN = 62.0, 14.0


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


@dataclass(frozen=True)
class Scene:
    """What every part of the drawing needs to know."""

    graph: FeatureGraph
    """What is drawn."""
    layout: Layout
    """Where it goes."""
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


def make_scene(graph: FeatureGraph, link: str, colour: Colour = "class") -> Scene:
    """Layout and sizes of a drawing of the graph.

    link: template of the nodes' hyperlinks; colour: what colours stand for, effects where no class is known.
    """
    if len(graph) == 0:
        raise GraphError("the graph has no nodes: there is nothing to draw")
    n_nodes = sum(node.kind != "metric" for node in graph.nodes())
    density = next(density for density in DENSITIES if n_nodes <= density.up_to)
    strongest = sorted(graph.nodes(), key=lambda node: -abs(node.effect))[: density.labelled]
    metric = (density.cell.box * 1.7, 2.6 * density.label + 1.4 * density.small + 12)
    layout = layered_layout(graph, cell=density.cell, metric=metric, space=density.space)
    labelled = frozenset(node.id for node in strongest)
    classes = find_classes(graph) if colour == "class" else None
    return Scene(graph, layout, density, labelled, link, largest_effect(graph), largest_weight(graph), classes)
