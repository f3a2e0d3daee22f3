"""From a large graph to one a person can read. Every function returns a new graph and leaves its input alone.

1. Thresholds and top-n keep nodes by |effect| and edges by |weight|; the metric node always stays.
2. `reachable` drops what has no path to the metric.
3. `influence` keeps the nodes, then the edges, that carry a given share of what reaches the metric, as circuit-tracer
   does (Ameisen et al. 2025, https://transformer-circuits.pub/2025/attribution-graphs/methods.html, "Graph pruning").
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import networkx as nx

from graphs.errors import GraphError
from graphs.feature_graph import METRIC, FeatureGraph


def by_node_threshold(graph: FeatureGraph, threshold: float) -> FeatureGraph:
    """Keep nodes with |effect| > `threshold`, and the metric."""
    return graph.subgraph(node.id for node in graph.nodes() if node.kind == "metric" or abs(node.effect) > threshold)


def by_top_nodes(graph: FeatureGraph, n: int) -> FeatureGraph:
    """Keep the `n` nodes of largest |effect| (ties: by order of the graph), and the metric beside them."""
    _check_count(n, "nodes")
    others = [node for node in graph.nodes() if node.kind != "metric"]
    strongest = {node.id for node in heapq.nlargest(n, others, key=lambda node: abs(node.effect))}
    return graph.subgraph(strongest | {METRIC})


def by_edge_threshold(graph: FeatureGraph, threshold: float) -> FeatureGraph:
    """Keep edges with |weight| > `threshold`; all nodes stay."""
    return graph.subgraph(graph.graph, edges=[edge[:2] for edge in graph.edges() if abs(edge.weight) > threshold])


def by_top_edges(graph: FeatureGraph, n: int) -> FeatureGraph:
    """Keep the `n` edges of largest |weight| (ties: by order of the graph); all nodes stay."""
    _check_count(n, "edges")
    strongest = heapq.nlargest(n, graph.edges(), key=lambda edge: abs(edge.weight))
    return graph.subgraph(graph.graph, edges=[(edge.source, edge.target) for edge in strongest])


def reachable(graph: FeatureGraph) -> FeatureGraph:
    """Keep the nodes with a path to the metric. A graph without edges, or without a metric, is returned whole.

    Args:
        graph: The graph.

    Returns:
        A graph of the kept nodes and all edges between them.
    """
    if graph.graph.number_of_edges() == 0 or METRIC not in graph:
        return graph.subgraph(graph.graph)
    return graph.subgraph(nx.ancestors(graph.graph, METRIC) | {METRIC})


@dataclass(frozen=True)
class Influence:
    """How much of what reaches the metric passes through each node and each edge."""

    nodes: dict[str, float]
    """Node id -> influence, 1 for the metric."""
    edges: dict[tuple[str, str], float]
    """(source, target) -> influence."""


def influence_scores(graph: FeatureGraph) -> Influence:
    """Share of the metric that each node and edge accounts for, over paths of every length.

    With Â[v, u] = |w(u→v)| / Σ_u' |w(u'→v)|, the incoming weights of v made to sum to 1,

        influence(metric) = 1        influence(u) = Σ_v Â[v, u] · influence(v)  =  e_metricᵀ Σ_{k≥1} Â^k  at u
        influence(u→v) = Â[v, u] · influence(v)

    One pass in reverse topological order, O(nodes + edges). Source: circuit-tracer, `graph.py`
    (`compute_node_influence`, `compute_edge_influence`); there the sum starts from several weighted logits, here
    from the one metric.
    """
    if METRIC not in graph:
        raise GraphError("influence needs a 'metric' node in the graph")
    nodes = dict.fromkeys(graph.graph, 0.0)
    nodes[METRIC] = 1.0
    edges: dict[tuple[str, str], float] = {}
    for target in reversed(list(nx.topological_sort(graph.graph))):
        incoming = list(graph.graph.in_edges(target, data="weight"))
        total = sum(abs(weight) for _, _, weight in incoming)
        for source, _, weight in incoming:
            share = abs(weight) / total * nodes[target] if total else 0.0
            edges[source, target] = share
            nodes[source] += share
    return Influence(nodes, edges)


def influence(graph: FeatureGraph, *, node_share: float = 0.8, edge_share: float = 0.98) -> FeatureGraph:
    """Keep the fewest nodes that hold `node_share` of all nodes' influence, then edges likewise, then the reachable.

    Edge influence is computed anew on the kept nodes, as in circuit-tracer (`prune_graph`, whose defaults these are).
    There a feature must also keep an incoming edge; here a circuit may start at any site, so only a path to the
    metric is asked for.

    Args:
        graph: The graph.
        node_share: Share of the nodes' influence, from 0 to 1.
        edge_share: Share of the edges' influence, from 0 to 1.

    Returns:
        A graph of the kept nodes and edges.

    Raises:
        GraphError: For another share, or a graph without a metric.
    """
    for name, share in (("node_share", node_share), ("edge_share", edge_share)):
        if not 0.0 <= share <= 1.0:
            raise GraphError(f"{name} is {share}: it must lie between 0 and 1")
    scores = influence_scores(graph).nodes
    chosen = _smallest_set({id: score for id, score in scores.items() if id != METRIC}, node_share)
    smaller = graph.subgraph({METRIC, *chosen})
    edges = _smallest_set(influence_scores(smaller).edges, edge_share)
    return reachable(smaller.subgraph(smaller.graph, edges=edges))


def _smallest_set(scores: dict, share: float) -> list:
    """The keys of the largest scores whose sum first reaches `share` of the total; keys of score 0 never."""
    needed = share * sum(scores.values()) * (1 - 1e-12) if share < 1 else math.inf  # rounding must not ask for more
    chosen: list = []
    reached = 0.0
    for key, score in sorted(scores.items(), key=lambda item: -item[1]):
        if score == 0.0 or reached >= needed:
            break
        chosen.append(key)
        reached += score
    return chosen


def _check_count(n: int, what: str) -> None:
    if n < 0:
        raise GraphError(f"cannot keep {n} {what}: the number must be 0 or more")
