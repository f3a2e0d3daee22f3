from __future__ import annotations

import itertools
import json

import networkx as nx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs import pruning
from graphs.errors import GraphError
from graphs.feature_graph import METRIC, FeatureGraph, feature_node, metric_node

weights = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def random_graphs(draw) -> FeatureGraph:
    """Up to eight features on four sites and a metric, any forward edges, weights that may be zero or equal."""
    places = draw(st.lists(st.integers(0, 3), min_size=1, max_size=8))
    graph = FeatureGraph(["a", "b", "c", "d"])
    for index, place in enumerate(places):
        graph.add_node(feature_node(graph.sites[place], index, effect=draw(weights)))
    graph.add_node(metric_node())
    for source, target in itertools.permutations(graph.graph, 2):
        if graph.rank(source) < graph.rank(target) and draw(st.booleans()):
            graph.add_edge(source, target, draw(weights))
    return graph


def paths_to_metric(graph: FeatureGraph, start: str):
    return nx.all_simple_paths(graph.graph, start, METRIC) if start != METRIC else []


def brute_influence(graph: FeatureGraph, start: str) -> float:
    """Sum over all paths to the metric of the product of normalised weights along the path."""
    total = 0.0
    for path in paths_to_metric(graph, start):
        product = 1.0
        for u, v in itertools.pairwise(path):
            incoming = sum(abs(w) for _, _, w in graph.graph.in_edges(v, data="weight"))
            product *= abs(graph.graph.edges[u, v]["weight"]) / incoming if incoming else 0.0
        total += product
    return total


@given(random_graphs(), st.floats(0, 10))
def test_thresholds_match_their_definition(graph, threshold):
    kept = pruning.by_node_threshold(graph, threshold)
    assert set(kept.graph) == {n.id for n in graph.nodes() if n.id == METRIC or abs(n.effect) > threshold}
    kept = pruning.by_edge_threshold(graph, threshold)
    assert set(kept.graph) == set(graph.graph)
    assert {e[:2] for e in kept.edges()} == {edge[:2] for edge in graph.edges() if abs(edge.weight) > threshold}


@given(random_graphs(), st.integers(0, 10))
def test_top_n_keeps_the_n_largest(graph, n):
    kept = pruning.by_top_nodes(graph, n)
    features = [node for node in graph.nodes() if node.id != METRIC]
    inside = [abs(node.effect) for node in features if node.id in kept]
    outside = [abs(node.effect) for node in features if node.id not in kept]
    assert METRIC in kept and len(inside) == min(n, len(features))
    assert not inside or not outside or min(inside) >= max(outside)

    edges = pruning.by_top_edges(graph, n).edges()
    rest = [abs(edge.weight) for edge in graph.edges() if edge not in edges]
    assert len(edges) == min(n, len(graph.edges()))
    assert not edges or not rest or min(abs(edge.weight) for edge in edges) >= max(rest)


@given(random_graphs())
def test_reachable_keeps_exactly_what_has_a_path(graph):
    kept = set(pruning.reachable(graph).graph)
    if not graph.edges():
        assert kept == set(graph.graph)
    else:
        assert kept == {METRIC} | {id for id in graph.graph if id != METRIC and any(paths_to_metric(graph, id))}


@given(random_graphs())
def test_influence_is_the_sum_over_paths(graph):
    scores = pruning.influence_scores(graph)
    for id in graph.graph:
        if id != METRIC:
            assert scores.nodes[id] == pytest.approx(brute_influence(graph, id), abs=1e-9)
            assert scores.nodes[id] == pytest.approx(sum(s for (u, _), s in scores.edges.items() if u == id), abs=1e-9)


@given(random_graphs(), st.floats(0.05, 0.99))
def test_influence_keeps_the_smallest_sufficient_set(graph, share):
    scores = {id: score for id, score in pruning.influence_scores(graph).nodes.items() if id != METRIC}
    total = sum(scores.values())
    chosen = {id for id in pruning.influence(graph, node_share=share, edge_share=1.0).graph if id != METRIC}
    needed = next(
        size
        for size in range(len(scores) + 1)
        if max(sum(c) for c in itertools.combinations(scores.values(), size)) >= share * total * (1 - 1e-12)
    )
    # What is kept first is the smallest set; afterwards only nodes cut off from the metric are dropped.
    assert len(chosen) <= needed
    everything = pruning.influence(graph, node_share=1.0, edge_share=1.0)
    assert {e[:2] for e in everything.edges()} == {e for e, s in pruning.influence_scores(graph).edges.items() if s > 0}


@given(random_graphs())
def test_pruning_is_pure(graph):
    before = json.dumps(graph.to_json())
    for prune in (
        lambda g: pruning.by_node_threshold(g, 1.0),
        lambda g: pruning.by_top_edges(g, 2),
        pruning.reachable,
        pruning.influence,
    ):
        assert prune(graph) is not graph
        assert json.dumps(graph.to_json()) == before


def test_a_worked_example_of_influence():
    graph = FeatureGraph(["a", "b"])
    for node in (feature_node("a", 0, effect=1.0), feature_node("b", 0, effect=1.0), feature_node("b", 1, effect=1.0)):
        graph.add_node(node)
    graph.add_node(metric_node())
    graph.add_edge("a/0", "b/0", -2.0)
    graph.add_edge("b/0", METRIC, 3.0)
    graph.add_edge("b/1", METRIC, -1.0)
    scores = pruning.influence_scores(graph)
    assert scores.nodes == {"a/0": 0.75, "b/0": 0.75, "b/1": 0.25, METRIC: 1.0}
    assert set(pruning.influence(graph, node_share=0.8).graph) == {"a/0", "b/0", METRIC}


def test_impossible_requests_are_refused():
    graph = FeatureGraph(["a"])
    with pytest.raises(GraphError, match="-1"):
        pruning.by_top_nodes(graph, -1)
    with pytest.raises(GraphError, match="metric"):
        pruning.influence(graph)
    graph.add_node(metric_node())
    with pytest.raises(GraphError, match=r"node_share is 1\.5"):
        pruning.influence(graph, node_share=1.5)
