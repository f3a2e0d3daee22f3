"""A layered layout in model order: the first site at the bottom and the metric on top.

1. One band a site. A site with more nodes than fit in the width is wrapped into sub-rows; the width is chosen so that
   the drawing comes near a given aspect ratio.
2. In a circuit by position, one column a position; each cell (site, position) is wrapped in the same way.
3. Within a band (or a cell) nodes are ordered by sweeps: each node moves towards the |weight|-mean of its neighbours
   (Sugiyama, Tagawa, Toda 1981), then takes the nearest free slot. Nodes of a supernode stay side by side.
4. An edge leaves from the top of its source and enters at the bottom of its target. On its way it goes through the
   gaps between the boxes of every row it crosses, so that it never seems to touch a node it does not belong to.

All lengths are in points, y grows upwards.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from graphs.feature_graph import METRIC, FeatureGraph, Node, Position

Point = tuple[float, float]


@dataclass(frozen=True)
class Cell:
    """The room one node gets; boxes are a little smaller."""

    width: float
    """From the centre of a node to the centre of the next in its row."""
    height: float
    """Height of a box."""
    gap: float
    """Free height between two rows of the same band."""
    box: float
    """Width of a box."""


@dataclass(frozen=True)
class Box:
    """A node's rectangle."""

    x: float
    """Centre."""
    y: float
    """Centre."""
    width: float
    """Full width."""
    height: float
    """Full height."""


@dataclass(frozen=True)
class Band:
    """The row, or wrapped rows, of one site."""

    site: str
    """The site's name."""
    bottom: float
    """Lower edge."""
    top: float
    """Upper edge."""


@dataclass(frozen=True)
class Column:
    """The column of one position."""

    position: Position
    """The position its nodes share."""
    left: float
    """Left edge."""
    right: float
    """Right edge."""


@dataclass(frozen=True)
class Layout:
    """A finished layout; the left lower corner is (0, 0)."""

    boxes: dict[str, Box]
    """Node id -> rectangle."""
    bands: list[Band]
    """The sites that have nodes, bottom to top."""
    columns: list[Column]
    """The positions, left to right; empty when positions are summed."""
    routes: dict[tuple[str, str], list[Point]]
    """(source, target) -> points of a Bézier spline: start, then three points a piece."""
    width: float
    """Width of the drawing."""
    height: float
    """Height of the drawing."""


def layered_layout(
    graph: FeatureGraph,
    *,
    cell: Cell,
    metric: tuple[float, float] = (180.0, 50.0),
    aspect: float = 1.3,
    space: float = 26.0,
    lane_space: float | None = None,
    padding: float = 7.0,
    route: bool = True,
) -> Layout:
    """Lay the graph out.

    Args:
        graph: The graph, its metric included.
        cell: The room of one node.
        metric: Width and height of the metric's box.
        aspect: Width over height that the drawing should come near.
        space: Free height between bands, where edges show.
        lane_space: The same between two sites of one layer (`attn_3`, `mlp_3`), `space` by default.
        padding: Free height inside a band, above and below its nodes.
        route: Whether to route the edges; `routes` stays empty otherwise.

    Returns:
        Rectangles of the nodes, bands, columns and routes.
    """
    rows, columns, width = _rows(graph, cell, aspect=aspect, space=space, padding=padding)
    boxes, bands = _stacked(rows, cell, space, space if lane_space is None else lane_space, padding)
    boxes = _ordered(graph, boxes, columns, sweeps=8)
    top = bands[-1].top if bands else 0.0
    if METRIC in graph:
        into = [(edge.source, abs(edge.weight)) for edge in graph.edges() if edge.target == METRIC]
        x = _mean_x(into, boxes, default=width / 2)
        half = metric[0] / 2
        y = top + space * 1.3 + metric[1] / 2
        boxes[METRIC] = Box(min(max(x, half), max(width - half, half)), y, *metric)
        top = y + metric[1] / 2
    routes = route_edges(graph, boxes) if route else {}
    return Layout(boxes, bands, columns, routes, max(width, metric[0]), top)


def layer(site: str) -> str:
    """The layer a site belongs to: `3` for `attn_3`, the site itself where its name has no number."""
    number = re.search(r"\d+", site)
    return number.group() if number else site


# --- rows, sub-rows, columns ------------------------------------------------------------------------------------------

Rows = list[tuple[str, list[dict[str, float]]]]
"""Site by site, bottom to top; a site's sub-rows; in each, node id -> x."""


def _stacked(
    rows: Rows, cell: Cell, space: float, lane_space: float, padding: float
) -> tuple[dict[str, Box], list[Band]]:
    """The boxes of all rows and the bands of the sites, bottom to top, for lengths as in `layered_layout`."""
    boxes: dict[str, Box] = {}
    bands: list[Band] = []
    y = 0.0
    for site, lines in rows:
        if bands:
            y += lane_space if layer(site) == layer(bands[-1].site) else space
        bottom = y
        y += padding
        for slots in lines:
            for id, x in slots.items():
                boxes[id] = Box(x, y + cell.height / 2, cell.box, cell.height)
            y += cell.height + cell.gap
        y += padding - cell.gap
        bands.append(Band(site, bottom, y))
    return boxes, bands


def _rows(
    graph: FeatureGraph, cell: Cell, *, aspect: float, space: float, padding: float
) -> tuple[Rows, list[Column], float]:
    """Put every node in a sub-row, with a first guess of x."""
    by_site: dict[str, dict[Position, list[str]]] = {site: defaultdict(list) for site in graph.sites}
    for node in sorted(graph.nodes(), key=lambda n: -abs(n.effect)):
        if node.kind != "metric":
            by_site[node.site][node.position].append(node.id)
    occupied = {site: cells for site, cells in by_site.items() if cells}
    positions: list[Position] = list(graph.positions)
    if any(None in cells for cells in occupied.values()):
        positions = [None, *positions]
    candidates = (_wrapped(occupied, positions, cell, limit) for limit in range(1, 41))
    fixed = space + 2 * padding - cell.gap

    def distance(candidate: tuple[Rows, list[Column], float]) -> float:
        rows, _, width = candidate
        height = sum(fixed + len(lines) * (cell.height + cell.gap) for _, lines in rows)
        return abs(math.log(max(width, 1.0) / max(height, 1.0) / aspect))

    rows, columns, width = min(candidates, key=distance)
    return rows, columns if any(p is not None for p in positions) else [], width


def _wrapped(
    occupied: dict[str, dict[Position, list[str]]], positions: list[Position], cell: Cell, limit: int
) -> tuple[Rows, list[Column], float]:
    """Rows when a whole band holds about `limit` nodes side by side: columns share them by their fullest cell."""
    fullest = {p: max(len(cells.get(p, ())) for cells in occupied.values()) for p in positions}
    total = sum(fullest.values())
    share = {p: max(1, min(n, round(limit * n / total))) for p, n in fullest.items()}
    columns: list[Column] = []
    left = 0.0
    margin = cell.width * 0.12 if len(positions) > 1 else 0.0
    for position in positions:
        columns.append(Column(position, left, left + share[position] * cell.width + 2 * margin))
        left = columns[-1].right
    rows: Rows = []
    for site, cells in occupied.items():
        lines: list[dict[str, float]] = [{} for _ in range(max(-(-len(v) // share[p]) for p, v in cells.items()))]
        for column in columns:
            members = cells.get(column.position, [])
            needed = -(-len(members) // share[column.position])
            first = (len(lines) - needed) // 2
            for row in range(needed):
                part = members[row::needed]
                start = (column.left + column.right - (len(part) - 1) * cell.width) / 2
                lines[first + row].update({id: start + index * cell.width for index, id in enumerate(part)})
        rows.append((site, lines))
    return rows, columns, left


# --- order within rows ------------------------------------------------------------------------------------------------


def _ordered(graph: FeatureGraph, boxes: dict[str, Box], columns: list[Column], *, sweeps: int) -> dict[str, Box]:
    """Let the nodes of each band (or cell) exchange places until edges are short; sub-rows are filled together."""
    near: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for source, target, weight, *_ in graph.edges():
        if METRIC not in (source, target):
            near[source].append((target, abs(weight)))
            near[target].append((source, abs(weight)))
    groups: dict[tuple[str, Position], list[Node]] = defaultdict(list)
    for node in graph.nodes():
        if node.id in boxes:
            groups[node.site, node.position].append(node)
    order = sorted(groups, key=lambda key: graph.sites.index(key[0]))
    supernode = {id: name for name, ids in graph.supernodes.items() for id in ids}
    placed = dict(boxes)
    for sweep in range(sweeps):
        for key in order if sweep % 2 == 0 else reversed(order):
            members = [node.id for node in groups[key]]
            slots = sorted((boxes[id] for id in members), key=lambda box: (box.x, box.y))
            wanted = {id: _mean_x(near[id], placed, default=placed[id].x) for id in members}
            for id, slot in zip(_side_by_side(wanted, supernode), slots, strict=True):
                placed[id] = slot
    return placed if columns else _spread(graph, placed, near)


def _side_by_side(wanted: dict[str, float], supernode: dict[str, str]) -> list[str]:
    """Nodes by where they want to be, those of a supernode together where they want to be on average."""
    together: dict[str, list[float]] = defaultdict(list)
    for id, x in wanted.items():
        together[supernode.get(id, id)].append(x)
    mean = {name: sum(values) / len(values) for name, values in together.items()}

    def key(id: str) -> tuple[float, str, float, str]:
        name = supernode.get(id, id)
        return mean[name], name, wanted[id], id

    return sorted(wanted, key=key)


def _mean_x(neighbours: Iterable[tuple[str, float]], placed: dict[str, Box], *, default: float) -> float:
    total = sum(weight for _, weight in neighbours)
    if total == 0:
        return default
    return sum(weight * placed[id].x for id, weight in neighbours) / total


def _spread(graph: FeatureGraph, placed: dict[str, Box], near: dict[str, list[tuple[str, float]]]) -> dict[str, Box]:
    """Loosen rows that have room: nodes move towards their neighbours but keep their order and distance."""
    rows: dict[float, list[str]] = defaultdict(list)
    for id, box in placed.items():
        rows[box.y].append(id)
    widest = max(len(ids) for ids in rows.values()) if rows else 0
    left = min((box.x for box in placed.values()), default=0.0)
    right = max((box.x for box in placed.values()), default=0.0)
    step = (right - left) / (widest - 1) if widest > 1 else 0.0
    result = dict(placed)
    for _ in range(4):
        for y in sorted(rows):
            ids = sorted(rows[y], key=lambda id: result[id].x)
            wanted = [0.5 * _mean_x(near[id], result, default=result[id].x) + 0.5 * placed[id].x for id in ids]
            for id, x in zip(ids, keep_apart(wanted, step, left, right), strict=True):
                result[id] = Box(x, y, result[id].width, result[id].height)
    return result


def keep_apart(wanted: list[float], step: float, low: float, high: float) -> list[float]:
    """The points nearest to `wanted` in the least-squares sense that keep their order, `step` apart, in [low, high].

    Subtracting place · step turns this into isotonic regression, solved by pooling adjacent violators.
    """
    pools: list[tuple[float, int]] = []
    for index, x in enumerate(wanted):
        mean, size = x - index * step, 1
        while pools and pools[-1][0] > mean:
            other, count = pools.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        pools.append((mean, size))
    flat = [mean for mean, size in pools for _ in range(size)]
    room = max(high - (len(wanted) - 1) * step, low)
    return [min(max(x, low), room) + index * step for index, x in enumerate(flat)]


# --- edges ------------------------------------------------------------------------------------------------------------


def route_edges(graph: FeatureGraph, boxes: dict[str, Box]) -> dict[tuple[str, str], list[Point]]:
    """A spline for every edge, through the gaps of the rows it crosses."""
    rows = _Rows(boxes.values())
    start = _ports(graph, boxes, side="top")
    end = _ports(graph, boxes, side="bottom")
    routes = {}
    for source, target, *_ in graph.edges():
        first = (start[source, target], boxes[source].y + boxes[source].height / 2)
        last = (end[source, target], boxes[target].y - boxes[target].height / 2)
        routes[source, target] = smooth([first, *rows.crossings(first, last), last])
    return routes


def _ports(graph: FeatureGraph, boxes: dict[str, Box], *, side: str) -> dict[tuple[str, str], float]:
    """The x on a box where each edge begins (top) or ends (bottom): by the other end, so that edges do not cross."""
    other: Callable[[tuple[str, str]], float]
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for source, target, *_ in graph.edges():
        groups[source if side == "top" else target].append((source, target))
    ports = {}
    for id, edges in groups.items():
        box, node = boxes[id], graph.node(id)
        pointed = (node.kind == "error" and side == "top") or node.kind == "skip"
        room = 0.0 if pointed else box.width * min(0.7, 0.12 * (len(edges) - 1))
        other = (lambda e: boxes[e[1]].x) if side == "top" else (lambda e: boxes[e[0]].x)
        for number, edge in enumerate(sorted(edges, key=other)):
            shift = number / (len(edges) - 1) - 0.5 if len(edges) > 1 else 0.0
            ports[edge] = box.x + shift * room
    return ports


class _Rows:
    """The boxes of every row as sorted intervals, to find the gap an edge can go through."""

    def __init__(self, boxes: Iterable[Box]) -> None:
        rows: dict[float, list[Box]] = defaultdict(list)
        for box in boxes:
            rows[box.y].append(box)
        self.heights = sorted(rows)
        self.rows = [sorted((b.x - b.width / 2, b.x + b.width / 2) for b in rows[y]) for y in self.heights]
        self.half = [max(b.height for b in rows[y]) / 2 for y in self.heights]
        self.used: dict[tuple[int, int], int] = defaultdict(int)

    def crossings(self, first: Point, last: Point) -> list[Point]:
        """Points at the rows strictly between the two: one where the way is free, two along a box it must go round."""
        low = bisect.bisect_right(self.heights, first[1])
        high = bisect.bisect_left(self.heights, last[1])
        points: list[Point] = []
        x, y = first
        for row in range(low, high):
            height = self.heights[row]
            straight = x + (last[0] - x) * (height - y) / (last[1] - y)
            x, y = self._free(row, straight), height
            if x == straight:
                points.append((x, y))
            else:
                points += [(x, y - self.half[row]), (x, y + self.half[row])]
        return points

    def _free(self, row: int, x: float) -> float:
        """The x nearest to the given one that lies between boxes; edges that share a gap take turns on three tracks."""
        boxes = self.rows[row]
        first_right = bisect.bisect_right(boxes, (x, math.inf))
        options = []
        for gap in (first_right - 1, first_right, first_right + 1):
            if 0 <= gap <= len(boxes):
                left = boxes[gap - 1][1] if gap > 0 else -math.inf
                right = boxes[gap][0] if gap < len(boxes) else math.inf
                margin = 3.5 + 2.5 * (self.used[row, gap] % 3)
                inside = min(max(x, left + margin), right - margin) if right - left > 2 * margin else (left + right) / 2
                options.append((abs(inside - x), inside, gap))
        _, nearest, gap = min(options)
        if nearest != x:
            self.used[row, gap] += 1
        return nearest


def smooth(points: list[Point]) -> list[Point]:
    """A Bézier spline through the points: vertical at its ends and beside boxes, along chords elsewhere."""
    slopes = [0.0]
    for (x0, y0), (x, _), (x1, y1) in zip(points, points[1:], points[2:], strict=False):
        slopes.append(0.0 if x in (x0, x1) else (x1 - x0) / (y1 - y0))
    slopes.append(0.0)
    spline = [points[0]]
    for index, ((x0, y0), (x1, y1)) in enumerate(itertools.pairwise(points)):
        third = (y1 - y0) / (2.2 if len(points) == 2 else 3)
        spline += [(x0 + slopes[index] * third, y0 + third), (x1 - slopes[index + 1] * third, y1 - third), (x1, y1)]
    return spline
