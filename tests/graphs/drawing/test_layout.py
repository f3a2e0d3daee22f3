from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.drawing.layout import Cell, keep_apart, layered_layout
from graphs.feature_graph import FeatureGraph, feature_node

CELL = Cell(width=100, height=40, gap=20, box=88)
CIRCUITS = [
    {"n_nodes": 30, "n_edges": 80},
    {"n_nodes": 30, "n_edges": 80, "positions": True},
    {"n_nodes": 120, "n_edges": 600, "n_layers": 6},
    {"n_nodes": 120, "n_edges": 600, "n_layers": 6, "positions": True},
]


@pytest.fixture(scope="module", params=CIRCUITS, ids=lambda options: "-".join(map(str, options.values())))
def drawn(request, make_circuit):
    """A circuit and its layout."""
    graph = make_circuit(**request.param)
    return graph, layered_layout(graph, cell=CELL)


def edges_of(box):
    return box.x - box.width / 2, box.x + box.width / 2, box.y - box.height / 2, box.y + box.height / 2


def test_boxes_do_not_overlap_and_stay_on_the_page(drawn):
    _, layout = drawn
    for a, b in itertools.combinations(layout.boxes.values(), 2):
        la, ra, ba, ta = edges_of(a)
        lb, rb, bb, tb = edges_of(b)
        assert ra <= lb or rb <= la or ta <= bb or tb <= ba
    for box in layout.boxes.values():
        left, right, bottom, top = edges_of(box)
        assert left >= -1e-9 and right <= layout.width + 1e-9 and bottom >= 0 and top <= layout.height + 1e-9


def test_sites_rise_in_model_order_and_positions_run_left_to_right(drawn):
    graph, layout = drawn
    for a, b in itertools.combinations(graph.nodes(), 2):
        if graph.rank(a.id) < graph.rank(b.id):
            assert layout.boxes[a.id].y < layout.boxes[b.id].y
        if a.position is not None and b.position is not None and a.position < b.position:
            assert layout.boxes[a.id].x < layout.boxes[b.id].x
    assert [column.position for column in layout.columns] == graph.positions


def test_edges_start_and_end_at_their_nodes_and_pass_beside_all_others(drawn):
    _, layout = drawn
    by_height: dict[float, list] = {}
    for box in layout.boxes.values():
        by_height.setdefault(box.y, []).append(box)
    for (source, target), spline in layout.routes.items():
        start, end = layout.boxes[source], layout.boxes[target]
        assert spline[0][1] == start.y + start.height / 2 and abs(spline[0][0] - start.x) <= start.width / 2
        assert spline[-1][1] == end.y - end.height / 2 and abs(spline[-1][0] - end.x) <= end.width / 2
        assert (len(spline) - 1) % 3 == 0
        for x, y in spline[3:-1:3]:
            for box in by_height.get(y, []):
                assert abs(x - box.x) >= box.width / 2


def test_ordering_uncrosses_two_parallel_edges():
    graph = FeatureGraph(["a", "b"])
    for site, feature, effect in (("a", 0, 2.0), ("a", 1, 1.0), ("b", 0, 1.0), ("b", 1, 2.0)):
        graph.add_node(feature_node(site, feature, effect=effect))
    graph.add_edge("a/0", "b/0", 1.0)
    graph.add_edge("a/1", "b/1", 1.0)
    boxes = layered_layout(graph, cell=CELL, aspect=2.0).boxes
    assert (boxes["a/0"].x < boxes["a/1"].x) == (boxes["b/0"].x < boxes["b/1"].x)


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=8), st.floats(0, 20))
def test_keep_apart_keeps_order_distance_and_range(wanted, step):
    wanted = sorted(wanted)
    low, high = -120.0, 120.0
    placed = keep_apart(wanted, step, low, high)
    assert all(b - a >= step - 1e-6 for a, b in itertools.pairwise(placed))
    assert placed[0] >= low - 1e-6 and placed[-1] <= max(high, low + (len(placed) - 1) * step) + 1e-6
    if all(b - a >= step for a, b in itertools.pairwise(wanted)):
        assert placed == pytest.approx(wanted, abs=1e-6)


def test_keep_apart_is_the_least_squares_answer():
    assert keep_apart([0.0, 0.0, 10.0], 4.0, -100, 100) == pytest.approx([-2.0, 2.0, 10.0])
