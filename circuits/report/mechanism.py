"""The mechanism in a table: the circuit's strongest features by span and class, and the way between spans.

1. A cell of the table holds the strongest features of one span (or position) that are on for one class of prompts.
2. Between two spans: which sites carry what passes, by the sum of |weight| of the edges that enter them from the other
   span.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from graphs.classes import Classes
from graphs.drawing.style import describe, position_name, span_words
from graphs.feature_graph import FeatureGraph, Node, Position

FEATURES_SHOWN = 4
"""Features of a cell."""
SPANS_SHOWN = 4
"""Spans with the largest effects."""
SITES_SHOWN = 3
"""Sites that carry the most from one span to another."""
LEAST_SHARE = 0.05
"""Ways between spans that carry less of all that passes are not told."""


@dataclass(frozen=True)
class Row:
    """The features of one span."""

    name: str
    """Name of the span; empty where positions are summed."""
    words: str
    """Words that stand there."""
    cells: list[list[tuple[Node, str]]]
    """For each class the strongest features that are on for it, with what they mean."""


@dataclass(frozen=True)
class Passage:
    """The edges that lead from one span to another, summed."""

    source: str
    """The span it comes from."""
    target: str
    """The span it goes to."""
    sites: list[tuple[str, float]]
    """The sites it enters by, with their share of it, largest first."""


def reading_table(graph: FeatureGraph, classes: Classes | None) -> tuple[list[str], list[Row]]:
    """The names of the classes, and the features of every span from the first to the last."""
    names = [name.replace("_", " ") for name in classes.names] if classes else ["features"]
    by_span: dict[Position, list[Node]] = defaultdict(list)
    for node in sorted(graph.nodes(), key=lambda node: -abs(node.effect)):
        if node.kind == "feature":
            by_span[node.position].append(node)
    strongest = sorted(by_span, key=lambda span: -sum(abs(node.effect) for node in by_span[span]))[:SPANS_SHOWN]
    rows = []
    shown: list[Position] = [span for span in graph.positions if span in strongest] or [None]
    for span in shown:
        cells = [
            [
                (node, describe(graph, node))
                for node in by_span[span]
                if classes is None or classes.side(node.id) == name
            ][:FEATURES_SHOWN]
            for name in names
        ]
        name = "" if span is None else position_name(graph, span)
        rows.append(Row(name, "" if span is None else span_words(graph, span), cells))
    return names, [row for row in rows if any(row.cells)]


def passages(graph: FeatureGraph) -> list[Passage]:
    """Passages between spans, strongest first."""
    weights: dict[tuple[Position, Position], dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for edge in graph.edges():
        start, end = graph.node(edge.source), graph.node(edge.target)
        if end.kind != "metric" and start.position != end.position:
            weights[start.position, end.position][end.site] += abs(edge.weight)
    totals = {between: sum(sites.values()) for between, sites in weights.items()}
    least = LEAST_SHARE * sum(totals.values())
    told = []
    for between in sorted(totals, key=lambda between: -totals[between]):
        if totals[between] > least:
            sites = sorted(weights[between].items(), key=lambda item: -item[1])[:SITES_SHOWN]
            shares = [(site, weight / totals[between]) for site, weight in sites]
            source, target = (position_name(graph, span) for span in between)
            told.append(Passage(source, target, [part for part in shares if part[1] >= LEAST_SHARE]))
    return told
