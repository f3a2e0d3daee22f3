"""The data of the explorer's page.

1. Every node and edge of the graph, numbers as they are; activations of contexts to three figures.
2. Layouts for growing numbers of the strongest nodes, so that the page shows 30 nodes as well as 3,000: each in two
   shapes, for a wide window and, where there are few nodes, for a tall one. `graphs/drawing/layout.py` makes them.
3. The JSON is compressed (gzip) and written in base64, which no text in it can leave; the browser unpacks it.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from graphs.classes import find_classes
from graphs.drawing.layout import Cell, Layout, layered_layout
from graphs.drawing.style import describe, position_name, span_words
from graphs.errors import GraphError
from graphs.feature_graph import METRIC, Edge, FeatureGraph, Node
from graphs.sharing import shared

SLOT = Cell(width=146, height=45, gap=12, box=134)
METRIC_BOX = (340.0, 40.0)
SPACE, LANE_SPACE, PADDING = 22.0, 12.0, 4.0
OWN_ENTRIES = ("title", "tokens", "positions", "supernodes")
"""Metadata that the page has elsewhere."""
SMALLEST, GROWTH, LARGEST_ROUTED, LARGEST_TALL = 8, 1.35, 160, 60
"""Nodes of the smallest layout, factor from one to the next, largest with routed edges, largest of the tall shape."""
ROUTED_PER_NODE = 4
"""How many of a layout's strongest edges are routed around boxes, in multiples of its nodes."""
WIDE, TALL = 1.45, 0.62
_DATA = re.compile(r'(?s)<script type="application/octet-stream" id="circuit">(.*?)</script>')


def page_data(
    graph: FeatureGraph, title: str, other: FeatureGraph | None = None, *, layouts: bool = True
) -> dict[str, Any]:
    """The page's data as plain JSON: the graph, with edges as [source, target, weight, interval, weights in the order
    of `edge_cases`] by the nodes' indices, and its layouts. With `other` the two graphs together, each node and edge
    marked with where it is.
    """
    drawn = graph if other is None else _union(graph, other)
    nodes, classes = drawn.nodes(), find_classes(drawn)
    cases = list(dict.fromkeys(case for edge in drawn.edges() for case in edge.by_case or {}))
    index = {node.id: number for number, node in enumerate(nodes)}
    keys = ("id", "site", "feature", "kind", "position", "effect", "label")
    groups = [{"name": name, "nodes": ids, "collapsed": True} for name, ids in drawn.supernodes.items() if len(ids) > 1]
    key = "\n".join([title, *index, *([json.dumps(groups)] if groups else [])])
    data = {
        "title": title,
        "key": hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:16],
        "groups": groups,
        "metadata": {k: v for k, v in shared(graph.metadata).items() if k not in OWN_ENTRIES},
        "sites": drawn.sites,
        "positions": [[p, position_name(drawn, p), span_words(drawn, p)] for p in drawn.positions],
        "nodes": [
            {
                "name": node.name,
                "words": describe(drawn, replace(node, label=None)),
                **{key: getattr(node, key) for key in keys},
                "attributes": _attributes(node),
            }
            for node in nodes
        ],
        "edges": [_edge(edge, index, cases) for edge in drawn.edges()],
        "edge_cases": cases,
        "layouts": _layouts(drawn, index) if layouts else [],
        "classes": None if classes is None else asdict(classes),
    }
    if other is not None:
        data["comparison"] = _comparison(graph, other, drawn)
    return data


def packed(data: Any) -> str:
    """JSON, compressed, in base64: letters, digits, `+`, `/` and `=` alone."""
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"))
    compressed = gzip.compress(text.encode("utf-8", "replace"), mtime=0)  # lone surrogates have no place in a file
    return base64.b64encode(compressed).decode("ascii")


def unpacked(html: str) -> dict[str, Any]:
    """Read the data back out of a page of the explorer; a text that is no such page raises GraphError."""
    element = _DATA.search(html)
    if element is None:
        raise GraphError("this is not a page of the explorer: it holds no circuit")
    return json.loads(gzip.decompress(base64.b64decode(element.group(1))))


def with_links(html: str, links: Mapping[str, str]) -> str:
    """A page of the explorer with more addresses of other pages; a text that is no such page raises GraphError."""
    data, element = unpacked(html), _DATA.search(html)
    assert element is not None  # unpacked found it
    start, stop = element.span(1)
    return html[:start] + packed({**data, "links": {**data.get("links", {}), **links}}) + html[stop:]


def _edge(edge: Edge, index: Mapping[str, int], cases: Sequence[str]) -> list[Any]:
    """An edge for the page, its bounds and weights by case in as many digits as are shown."""
    bounds = None if edge.interval is None else [float(f"{bound:.5g}") for bound in edge.interval]
    weights = [(edge.by_case or {}).get(case) for case in cases]
    rounded = [None if weight is None else float(f"{weight:.4g}") for weight in weights]
    return [index[edge.source], index[edge.target], edge.weight, bounds, *([rounded] if edge.by_case else [])]


# --- two graphs -------------------------------------------------------------------------------------------------------


def _union(graph: FeatureGraph, other: FeatureGraph) -> FeatureGraph:
    """Nodes and edges of both; what is in both has the values of the first."""
    sites = [*graph.sites, *(site for site in other.sites if site not in graph.sites)]
    if [site for site in sites if site in other.sites] != other.sites:
        raise GraphError("the graphs cannot be compared: their sites come in different orders")
    union = FeatureGraph(sites, metadata=graph.metadata)
    for node in [*graph.nodes(), *(node for node in other.nodes() if node.id not in graph)]:
        union.add_node(node)
    for edge in [*graph.edges(), *(e for e in other.edges() if not graph.graph.has_edge(*e[:2]))]:
        union.add_edge(edge.source, edge.target, edge.weight, interval=edge.interval, by_case=edge.by_case)
    return union


def _comparison(graph: FeatureGraph, other: FeatureGraph, union: FeatureGraph) -> dict[str, Any]:
    """The other graph's name, its effects and weights in the order of the union (None where it lacks one), and what
    it alone has.
    """
    weights = {edge[:2]: edge.weight for edge in other.edges()}
    return {
        "title": str(other.metadata.get("title") or "second graph"),
        "effects": [other.node(node.id).effect if node.id in other else None for node in union.nodes()],
        "weights": [weights.get(edge[:2]) for edge in union.edges()],
        "only_nodes": [i for i, node in enumerate(union.nodes()) if node.id not in graph],
        "only_edges": [i for i, edge in enumerate(union.edges()) if not graph.graph.has_edge(*edge[:2])],
    }


# --- layouts ----------------------------------------------------------------------------------------------------------


def _layouts(graph: FeatureGraph, index: dict[str, int]) -> list[dict[str, Any]]:
    ranked = sorted((n for n in graph.nodes() if n.kind != "metric"), key=lambda n: -abs(n.effect))
    edges = sorted(graph.edges(), key=lambda edge: -abs(edge.weight))
    edge_index = {edge[:2]: number for number, edge in enumerate(graph.edges())}
    layouts = []
    for size in _sizes(len(ranked)):
        ids = {node.id for node in ranked[:size]} | ({METRIC} if METRIC in graph else set())
        between = [edge[:2] for edge in edges if edge.source in ids and edge.target in ids]
        route = size <= LARGEST_ROUTED
        smaller = graph.subgraph(ids, edges=between[: ROUTED_PER_NODE * size] if route else between)
        for shape in (WIDE, TALL) if size <= LARGEST_TALL else (WIDE,):
            layout = layered_layout(
                smaller, cell=SLOT, metric=METRIC_BOX, aspect=shape, space=SPACE, lane_space=LANE_SPACE,
                padding=PADDING, route=route,
            )  # fmt: skip
            layouts.append({"size": size, "tall": shape == TALL, **_layout(layout, index, edge_index)})
    return layouts


def _sizes(n: int) -> list[int]:
    """Numbers of nodes that have a layout of their own, the last of them all nodes."""
    sizes = [SMALLEST]
    while sizes[-1] * GROWTH < n:
        sizes.append(round(sizes[-1] * (GROWTH if sizes[-1] < 100 else 1.8)))
    return [size for size in sizes if size < n] + [n]


def _layout(layout: Layout, index: dict[str, int], edge_index: dict[tuple[str, str], int]) -> dict[str, Any]:
    return {
        "width": layout.width,
        "height": layout.height,
        "box": [SLOT.box, SLOT.height, *METRIC_BOX],
        "nodes": [[index[id], round(box.x), round(box.y)] for id, box in layout.boxes.items()],
        "bands": [[band.site, round(band.bottom), round(band.top)] for band in layout.bands],
        "columns": [[column.position, round(column.left), round(column.right)] for column in layout.columns],
        "routes": {edge_index[ends]: [round(c) for p in points for c in p] for ends, points in layout.routes.items()},
    }


# --- plain JSON -------------------------------------------------------------------------------------------------------


def _attributes(node: Node) -> dict[str, Any]:
    """The node's attributes, activations and logits to three figures."""
    attributes = dict(node.attributes)
    for key in ("contexts", "top_logits", "bottom_logits", "samples", "random", "logit_histogram", "similar"):
        if key in attributes:
            attributes[key] = _rounded(attributes[key])
    return attributes


def _rounded(value: Any) -> Any:
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    """The value as JSON has it: what is not a finite number becomes null, what has no form in JSON its text."""
    if type(value) in (str, int):  # most of a page
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)
