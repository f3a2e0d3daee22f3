"""Draw a feature graph with Graphviz: DOT, SVG, PNG and PDF.

1. `layered_layout` places nodes and routes edges; the positions are written into the DOT text, whose `layout=nop2`
   tells every Graphviz program to keep them (`dot -Tsvg circuit.dot` gives the same picture).
2. Sites are clusters, bottom to top in model order. Features are rounded boxes, coloured by the class of prompts they
   are on for, with a bar as long as their |effect|; where classes are not known, or by `colour="effect"`, by sign and
   size of the effect. SAE errors are triangles, skip connections diamonds; the metric is on top.
3. The more nodes, the smaller the boxes and the shorter their labels; in large graphs only the strongest keep a label,
   the others their id. Everything is in the tooltips of the SVG.
4. Graphviz comes with the wheels of pygraphviz: no system package is needed.
"""

from __future__ import annotations

import math
from pathlib import Path

import graphviz

from graphs._files import atomic_write, marked
from graphs._outputs import check_output, has_mark
from graphs.drawing.graphviz import Detail, run_graphviz
from graphs.drawing.layout import Box
from graphs.drawing.scene import (
    GUTTER,
    MARGIN,
    OUTLINE,
    Scene,
    add_columns,
    add_legend,
    add_title,
    html_text,
    make_scene,
    quoted,
)
from graphs.drawing.style import (
    INK,
    NEGATIVE_EDGE,
    PALE_INK,
    PLAIN_EDGE,
    POSITIVE_EDGE,
    RULE,
    describe,
    diverging_colour,
    effect_number,
    effect_words,
    fit,
    ink_on,
    mixed,
    number,
    position_name,
    scale_colour,
    signed_root,
    text_width,
    tooltip,
    visible,
    wrap,
)
from graphs.errors import GraphError
from graphs.feature_graph import OTHERS, Edge, FeatureGraph, Node, Position
from graphs.pruning import by_top_edges, by_top_nodes
from graphs.schema import Colour

FORMATS = (".dot", ".svg", ".png", ".pdf")
FONT = "DejaVu Sans"


def to_dot(graph: FeatureGraph, *, title: str | None = None, link: str = "#node-{id}", colour: Colour = "class") -> str:
    """Give the graph as DOT, with the positions of nodes.

    Args:
        graph: The graph, with at least one node.
        title: Heading of the drawing, `graph.metadata["title"]` by default.
        link: Template of the nodes' hyperlinks in SVG, with `{id}` and `{name}`.
        colour: What colours stand for, as in `draw`.

    Returns:
        DOT; the SVG element of a node gets the id `drawn-{id}`, that of an edge `drawn-{source}--{target}`.

    Raises:
        GraphError: For a graph without nodes.
    """
    return _source(make_scene(graph, link, colour), title)


def _source(scene: Scene, title: str | None) -> str:
    graph = scene.graph
    dot = graphviz.Digraph("circuit")
    width, height = scene.size
    dot.attr("graph", layout="nop2", outputorder="edgesfirst", bgcolor="white", bb=f"0,0,{width:.1f},{height:.1f}")
    dot.attr("graph", fontname=FONT, pad="0.15", tooltip=" ")
    dot.attr("node", fontname=FONT, fixedsize="shape", margin="0", penwidth="0.8")
    dot.attr("edge", fontname=FONT)
    _add_bands(dot, scene)
    for node in graph.nodes():
        if node.kind == "metric":
            _add_metric(dot, scene, node)
    add_columns(dot, scene)
    for edge in sorted(graph.edges(), key=lambda edge: abs(edge.weight)):
        _add_edge(dot, scene, edge)
    add_title(dot, scene, title)
    add_legend(dot, scene)
    return dot.source


def draw(
    graph: FeatureGraph,
    path: str | Path,
    *,
    title: str | None = None,
    link: str = "#node-{id}",
    colour: Colour = "class",
    overwrite: bool = False,
) -> Path:
    """Draw the graph into a file.

    Args:
        graph: The graph, with at least one node.
        path: A .dot, .svg, .png or .pdf file; the extension decides.
        title: Heading of the drawing, `graph.metadata["title"]` by default.
        link: Template of the nodes' hyperlinks in SVG, with `{id}` and `{name}`.
        colour: What colours stand for: "class", the prompts a feature is on for, where the graph knows them
            (`graphs.classes`); or "effect", whether it lowers or raises the metric.
        overwrite: Whether a file is replaced that this program did not write.

    Returns:
        The path.

    Raises:
        GraphError: For another extension, a graph without nodes, a file that cannot be written or is another program's.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise GraphError(f"cannot draw into {path.name!r}: its extension must be one of {', '.join(FORMATS)}")
    check_output(path, has_mark(kind), overwrite=overwrite)
    if kind == ".dot":
        drawing = to_dot(graph, title=title, link=link, colour=colour).encode(errors="backslashreplace")
    else:
        drawing = _drawing(graph, kind[1:], title=title, link=link, colour=colour)
    with atomic_write(path) as temporary:
        temporary.write_bytes(marked(drawing, kind))
    return path


def to_svg(
    graph: FeatureGraph, *, nodes: int, edges: int | None = None, title: str = "", portrait: bool = False
) -> str:
    """Draw the strongest nodes and edges as an `<svg>` element that can stand inside a page.

    Args:
        graph: The graph, with at least one node.
        nodes: How many nodes are drawn at most.
        edges: How many edges are drawn at most; all between the nodes by default.
        title: Heading of the drawing.
        portrait: Whether it is taller than wide.

    Returns:
        The element.
    """
    strongest = by_top_nodes(graph, nodes)
    strongest = strongest if edges is None else by_top_edges(strongest, edges)
    svg = _drawing(strongest, "svg", title=title, portrait=portrait).decode()
    return svg[svg.index("<svg") :]


def _drawing(
    graph: FeatureGraph, kind: str, *, title: str | None, link: str = "#node-{id}", colour: Colour = "class",
    portrait: bool = False,
) -> bytes:  # fmt: skip
    scene = make_scene(graph, link, colour, portrait=portrait)
    return run_graphviz(_source(scene, title), kind, size=max(scene.size), details=_details(scene))


def _details(scene: Scene) -> dict[str, Detail]:
    """Descriptions of nodes and edges for the SVG, and the centres of all lines of text."""
    graph, layout = scene.graph, scene.layout
    details = {_edge_id(edge): Detail(_edge_tooltip(edge)) for edge in graph.edges()}
    for node in graph.nodes():
        centre = scene.point(layout.boxes[node.id].x, 0)[0]
        details[visible(f"drawn-{node.id}")] = Detail(tooltip(graph, node), centre)
    for band in layout.bands:
        details[f"site-{band.site}"] = Detail(band.site, MARGIN + GUTTER / 2)
    for index, column in enumerate(layout.columns):
        centre = scene.point((column.left + column.right) / 2, 0)[0]
        for side in ("above", "below", "words"):
            details[f"column-{index}-{side}"] = Detail(position_name(graph, column.position), centre)
    for name in ("title", "facts"):
        details[name] = Detail("", scene.size[0] / 2)
    return details


# --- nodes ------------------------------------------------------------------------------------------------------------


def _add_bands(dot: graphviz.Digraph, scene: Scene) -> None:
    """A cluster for each site, with its nodes."""
    members: dict[str, list[Node]] = {}
    for node in scene.graph.nodes():
        members.setdefault(node.site, []).append(node)
    width = scene.size[0]
    for band in scene.layout.bands:
        (_, bottom), (_, top) = scene.point(0, band.bottom), scene.point(0, band.top)
        with dot.subgraph(name=f"cluster_{band.site}") as cluster:
            cluster.attr(
                label=f"<{html_text(band.site, 9.5, PALE_INK, bold=True)}>",
                bb=f"{MARGIN:.1f},{bottom:.1f},{width - MARGIN:.1f},{top:.1f}",
                lp=f"{MARGIN + GUTTER / 2:.1f},{(bottom + top) / 2:.1f}",
                bgcolor="#f5f6f8",
                pencolor="#f5f6f8",
                id=f"site-{band.site}",
                tooltip=band.site,
            )
            runs = _supernode_runs(scene, members[band.site])
            for number, (name, nodes) in enumerate(runs):
                with cluster.subgraph(name=f"cluster_{band.site}_{number}") as inner:
                    _add_outline(inner, scene, name, nodes)
            inside = {node.id for _, nodes in runs for node in nodes}
            for node in sorted(members[band.site], key=lambda node: scene.layout.boxes[node.id].x):
                if node.id not in inside:
                    _add_node(cluster, scene, node)


def _supernode_runs(scene: Scene, nodes: list[Node]) -> list[tuple[str, list[Node]]]:
    """The nodes of each supernode, if it has several here, among those of a site that stand side by side: in one row of
    one column.
    """
    supernode = {id: name for name, ids in scene.graph.supernodes.items() if len(ids) > 1 for id in ids}
    runs: dict[tuple[str, float, Position], list[Node]] = {}
    for node in nodes:
        if node.id in supernode:
            runs.setdefault((supernode[node.id], scene.layout.boxes[node.id].y, node.position), []).append(node)
    return [(name, run) for (name, *_), run in runs.items()]


def _add_outline(dot: graphviz.Digraph, scene: Scene, name: str, nodes: list[Node]) -> None:
    """A cluster around the nodes of a supernode that stand side by side, with its name above them."""
    boxes = [scene.layout.boxes[node.id] for node in nodes]
    size = scene.density.small
    left, right = min(box.x - box.width / 2 for box in boxes), max(box.x + box.width / 2 for box in boxes)
    (x0, y0) = scene.point(left - OUTLINE, boxes[0].y - boxes[0].height / 2 - OUTLINE)
    (x1, y1) = scene.point(right + OUTLINE, boxes[0].y + boxes[0].height / 2 + OUTLINE + 1.25 * size)
    shown = fit(visible(name), size, right - left, bold=True)
    dot.attr(
        label=f"<{html_text(shown, size, INK, bold=True)}>",
        bb=f"{x0:.1f},{y0:.1f},{x1:.1f},{y1:.1f}",
        lp=f"{(x0 + x1) / 2:.1f},{y1 - 0.75 * size:.1f}",
        style="rounded,filled",
        bgcolor="#e3e7ee",
        pencolor="#8d97a5",
        id=f"supernode-{nodes[0].id}",
        tooltip=quoted(name),
    )
    for node in sorted(nodes, key=lambda node: scene.layout.boxes[node.id].x):
        _add_node(dot, scene, node)


def _add_node(dot: graphviz.Digraph, scene: Scene, node: Node) -> None:
    box = scene.layout.boxes[node.id]
    fill, border = _colours(scene, node)
    ink = ink_on(fill)
    if node.kind in OTHERS:
        box = Box(box.x, box.y, min(box.width, box.height * 1.9), box.height)
        small = scene.density.small
        words = (" ", *((node.kind,) if scene.density.lines > 1 else ()), effect_number(node))
        words = words[1:] if node.kind == "skip" else words  # the blank line moves the others down in a triangle
        text = "<BR/>".join(html_text(word, small * 0.85, ink) for word in words)
        shape = {"shape": "triangle" if node.kind == "error" else "diamond"}
    else:
        text = _feature_text(scene, node, box, ink)
        shape = {"shape": "box", "style": "rounded,filled"}
    dot.node(
        _name(node.id),
        f"<{text}>",
        **{"style": "filled", **shape},
        fillcolor=fill,
        color=border,
        **_common(scene, node, box),
    )
    if scene.classes is not None and node.kind == "feature":
        _add_bar(dot, scene, node, box, ink)


def _colours(scene: Scene, node: Node) -> tuple[str, str]:
    """Colours of a node's face and border."""
    if scene.classes is not None and node.kind in OTHERS:  # no class: the larger the effect, the darker the border
        return scale_colour(0.0), mixed(RULE, INK, abs(signed_root(node.effect, scene.effect)))
    if scene.classes is not None:
        contrast = scene.classes.contrast.get(node.id, 0.0)
        strength = 0.3 + 0.7 * abs(signed_root(node.effect, scene.effect))
        return scale_colour(contrast * strength), scale_colour(math.copysign(max(abs(contrast), 0.3), contrast))
    border = max(4 * abs(node.effect), 0.1 * scene.effect)
    fill = diverging_colour(node.effect, scene.effect)
    return fill, diverging_colour(math.copysign(border, node.effect), scene.effect)


def _add_bar(dot: graphviz.Digraph, scene: Scene, node: Node, box: Box, ink: str) -> None:
    """A bar at the foot of a node's box, as long as its |effect|."""
    length = (box.width - 16) * abs(node.effect) / scene.effect if scene.effect else 0.0
    x, y = scene.point(box.x - box.width / 2 + 8 + length / 2, box.y - box.height / 2 + 3.2)
    dot.node(
        _name(f"bar-{node.id}"), label="", pos=f"{x:.1f},{y:.1f}", shape="box", style="filled", penwidth="0",
        fillcolor=f"{ink}b0", width=f"{length / 72:.4f}", height="0.026", tooltip=" ",
    )  # fmt: skip


def _feature_text(scene: Scene, node: Node, box: Box, ink: str) -> str:
    """The label on one or two lines, then id and effect in small type."""
    density = scene.density
    room = box.width - 6
    label = describe(scene.graph, node) if node.id in scene.labelled else ""
    name, shown = node.name, (effect_number(node), number(node.effect))
    rooms = (room - 8, room)  # two numbers need air around them
    lengths = [text_width(f"{name}  {words}", density.small) for words in shown]
    fitting = [words for words, length, least in zip(shown, lengths, rooms, strict=True) if length <= least]
    fits, effect = bool(fitting), fitting[0] if fitting else shown[0]
    if fits:
        name += f"  {effect}"
    small = [_spaced(html_text(fit(name, density.small, room), density.small, ink), density.small)]
    if not fits and not label:
        small.append(html_text(effect, density.small, ink))
    lines = wrap(label, density.label, room, lines=density.lines, bold=bool(node.label))
    return "<BR/>".join([*(html_text(line, density.label, ink, bold=bool(node.label)) for line in lines), *small])


def _add_metric(dot: graphviz.Digraph, scene: Scene, node: Node) -> None:
    box = scene.layout.boxes[node.id]
    density = scene.density
    label = node.label or str(scene.graph.metadata.get("metric") or "metric")
    lines = wrap(visible(label), density.label, box.width - 10, lines=2, bold=True)
    text = [html_text(line, density.label, "#ffffff", bold=True) for line in lines]
    for words in effect_words(scene.graph, node):
        text.append(_spaced(html_text(words, density.small, "#d5dae1"), density.small))
    style = {"shape": "box", "style": "rounded,filled", "fillcolor": INK, "color": INK}
    dot.node(_name(node.id), f"<{'<BR/>'.join(text)}>", **style, **_common(scene, node, box))


def _common(scene: Scene, node: Node, box: Box) -> dict[str, str]:
    x, y = scene.point(box.x, box.y)
    return {
        "pos": f"{x:.1f},{y:.1f}",
        "width": f"{box.width / 72:.3f}",
        "height": f"{box.height / 72:.3f}",
        "id": quoted(f"drawn-{node.id}"),
        "URL": quoted(scene.link.replace("{id}", node.id).replace("{name}", node.name)),
        "tooltip": quoted(node.id),
    }


# --- edges ------------------------------------------------------------------------------------------------------------


def _add_edge(dot: graphviz.Digraph, scene: Scene, edge: Edge) -> None:
    strength = abs(signed_root(edge.weight, scene.weight))
    crowd = min(1.0, (160 / max(1, scene.graph.graph.number_of_edges())) ** 0.5)
    opacity = max(0.06, (0.12 + 0.8 * strength**1.5) * (crowd + (1 - crowd) * strength))
    signed = POSITIVE_EDGE if edge.weight > 0 else NEGATIVE_EDGE
    colour = (signed if scene.classes is None else PLAIN_EDGE) + f"{round(255 * min(opacity, 0.92)):02x}"
    points = [scene.point(*point) for point in scene.layout.routes[edge.source, edge.target]]
    head = 3.0 + 4.0 * strength
    x, y = points[-1]
    points[-1] = (x, y - head)  # the arrow covers the rest
    spline = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    dot.edge(
        _name(edge.source),
        _name(edge.target),
        pos=f"e,{x:.1f},{y:.1f} {spline}",
        color=colour,
        penwidth=f"{0.5 + 3.2 * strength**2:.2f}",
        style="dashed" if edge.weight < 0 and scene.classes is not None else "solid",
        arrowsize=f"{head / 10:.2f}",
        id=quoted(_edge_id(edge)),
        tooltip=quoted(_edge_tooltip(edge)),
    )


def _edge_id(edge: Edge) -> str:
    return visible(f"drawn-{edge.source}--{edge.target}")


def _edge_tooltip(edge: Edge) -> str:
    text = f"{visible(edge.source)} → {visible(edge.target)}\nweight {number(edge.weight)}"
    if edge.interval is None:
        return text
    return f"{text}\ninterval {number(edge.interval[0])} to {number(edge.interval[1])}"


def _spaced(html: str, size: float) -> str:
    """A line with more room above it: Graphviz makes a line as high as its largest character."""
    space = f'<FONT POINT-SIZE="{size * 1.35:g}">&#160;</FONT>'
    return space + html + space


def _name(id: str) -> str:
    """A node's name in DOT, where a colon would begin a port."""
    return quoted(id.replace(":", "∶"))
