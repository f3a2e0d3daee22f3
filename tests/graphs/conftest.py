"""Synthetic circuits with the looks of real ones: heavy-tailed effects, labels, contexts, edges that skip sites."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings

from graphs.feature_graph import METRIC, FeatureGraph, Node, error_node, feature_node, metric_node

settings.register_profile("suite", max_examples=30, derandomize=True, deadline=None, database=None)
settings.load_profile("suite")  # the same examples in every run; a busy machine is not a failure

TOKENS = ["<bos>", "The", " girls", " near", " the", " old", " cabin"]
LABELS = [
    "plural nouns", "singular nouns", "plural subject, verb expected", "prepositions after a noun",
    "determiner before a noun", "promotes “are”, “were”, “have”", "promotes “is”, “was”, “has”",
    "inside a relative clause", "people, plural", "places", "first token of a sentence",
    "number of the distractor noun",
]  # fmt: skip
WORDS = [
    " girls",
    " boys",
    " are",
    " is",
    " were",
    " has",
    " have",
    " cabins",
    " the",
    " near",
    " of",
    " which",
    " <b>&",
]


@pytest.fixture(scope="session")
def make_circuit() -> Callable[..., FeatureGraph]:
    """`make_circuit(n_nodes=300, n_edges=2000, positions=True, ...)`."""
    return build_circuit


def model_sites(n_layers: int) -> list[str]:
    """embed, then attn, mlp and resid of every layer."""
    return ["embed", *(f"{kind}_{layer}" for layer in range(n_layers) for kind in ("attn", "mlp", "resid"))]


def build_circuit(
    *,
    n_nodes: int = 30,
    n_edges: int = 80,
    n_layers: int = 4,
    positions: bool = False,
    labels: float = 0.5,
    seed: int = 0,
) -> FeatureGraph:
    """A random circuit of `n_nodes` nodes (the metric not counted) and about `n_edges` edges."""
    rng = random.Random(seed)
    sites = model_sites(n_layers)
    metadata: dict[str, Any] = {
        "title": "Subject–verb agreement across a prepositional phrase",
        "metric": "logit(patch answer) − logit(clean answer)",
        "method": "integrated gradients",
        "examples": 100,
    }
    if positions:
        metadata["tokens"] = TOKENS
    graph = FeatureGraph(sites, metadata=metadata)
    for node in _nodes(rng, sites, n_nodes, positions, labels):
        graph.add_node(node)
    graph.add_node(metric_node(effect=3.21))
    _add_edges(graph, rng, n_edges)
    return graph


def _nodes(rng: random.Random, sites: list[str], n: int, positions: bool, labels: float) -> list[Node]:
    found: dict[str, Node] = {}
    while len(found) < n:
        site = rng.choice(sites)
        position = rng.choice([2, 2, 2, 3, 4, 6, 6, 6]) if positions else None
        effect = rng.choice([1, 1, 1, -1]) * rng.lognormvariate(-2.2, 1.1)
        if rng.random() < 0.13:
            node = error_node(site, effect=effect, position=position)
        else:
            node = feature_node(site, rng.randrange(1024), effect=effect, position=position, **_attributes(rng, effect))
            if rng.random() < labels:
                node = replace(node, label=rng.choice(LABELS))
        found.setdefault(node.id, node)
    return list(found.values())


def _attributes(rng: random.Random, effect: float) -> dict[str, Any]:
    return {
        "activation": round(rng.uniform(0.5, 9), 3),
        "exact_effect": effect * rng.uniform(0.8, 1.1),
        "density": rng.lognormvariate(-5, 1),
        "top_tokens": rng.sample(WORDS, 4),
        "top_logits": [[word, rng.uniform(0, 2)] for word in rng.sample(WORDS, 5)],
        "bottom_logits": [[word, -rng.uniform(0, 2)] for word in rng.sample(WORDS, 5)],
        "contexts": [_context(rng) for _ in range(5)],
    }


def _context(rng: random.Random) -> dict[str, Any]:
    tokens = ["The", *rng.choices(WORDS, k=14)]
    peak = rng.randrange(len(tokens))
    return {
        "tokens": tokens,
        "activations": [max(0.0, 6 - 3 * abs(place - peak)) * rng.uniform(0.6, 1) for place in range(len(tokens))],
    }


def _add_edges(graph: FeatureGraph, rng: random.Random, n: int) -> None:
    nodes = graph.nodes()
    for node in nodes:
        if node.kind != "metric" and graph.rank(node.id) >= len(graph.sites) // 2:
            graph.add_edge(node.id, METRIC, node.effect * rng.uniform(0.2, 1))
    n_edges = graph.graph.number_of_edges()  # counted here, since networkx counts by going over all nodes
    for _ in range(200 * n):
        if n_edges >= n:
            break
        source, target = rng.choice(nodes), rng.choice(nodes)
        gap = graph.rank(target.id) - graph.rank(source.id)
        backward = isinstance(source.position, int) and isinstance(target.position, int)
        backward = backward and source.position > target.position  # type: ignore[operator]
        if target.kind == "metric" or gap <= 0 or backward or rng.random() > 2.0 / gap:
            continue
        if not graph.graph.has_edge(source.id, target.id):
            size = min(abs(source.effect), abs(target.effect)) * rng.uniform(0.05, 1)
            weight = rng.choice([1, 1, -1]) * size
            interval = (weight - size / 3, weight + size / 2) if n_edges % 2 else None
            by_case = {"singular": 1.5 * weight, "plural": 0.5 * weight} if n_edges % 3 else None
            graph.add_edge(source.id, target.id, weight, interval=interval, by_case=by_case)
            n_edges += 1
