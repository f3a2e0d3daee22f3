"""Read the results of `sfc attention` beside a circuit, for report and export: attention.json, attention_NAME.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, FiniteFloat
from typing_extensions import NotRequired, TypedDict

from graphs.feature_graph import FeatureGraph, Node
from graphs.formats.qk_tracing import KEY, QKTracing
from graphs.schema import Index
from sae._files import check_type, read_json

TRACED = 10
"""Pairs, and features of a side, that an exported node names."""


HEADS_OF_A_FEATURE, PARTNERS = 4, 5
"""Scores on the page of a feature, and features that it pairs with in each."""
LEAST_SHARE = 0.15
"""Pairs that add less than this share of a feature's largest are not on its page."""


class EdgeFile(TypedDict):
    """An edge by head."""

    source: str
    target: str
    site: str
    weight: FiniteFloat
    heads: list[FiniteFloat]
    rest: FiniteFloat


class LoadingsFile(TypedDict):
    """Edges by head."""

    edges: list[EdgeFile]
    n_prompts: Index


class PairFile(TypedDict):
    """A pair behind a score."""

    query: str
    key: str
    contribution: FiniteFloat


class TermFile(TypedDict):
    """A feature of one side."""

    node: str
    contribution: FiniteFloat
    words: list[str]


class MatrixFile(TypedDict):
    """The largest features of both sides, and what their pairs add."""

    queries: list[str]
    keys: list[str]
    values: list[list[FiniteFloat]]


def _full(matrix: Mapping[str, Any]) -> Mapping[str, Any]:
    rows, columns = len(matrix["queries"]), len(matrix["keys"])
    if len(matrix["values"]) != rows or any(len(row) != columns for row in matrix["values"]):
        raise ValueError(f"{rows} rows of {columns} values")
    return matrix


class ScoreFile(TypedDict):
    """A score by pairs of features."""

    layer: Index
    head: Index
    site: str
    query: str
    key: str
    than: str | None
    title: str
    n_prompts: Index
    score: FiniteFloat
    weight: FiniteFloat
    than_weight: FiniteFloat | None
    softcap: NotRequired[FiniteFloat | None]
    pairs: list[PairFile]
    queries: list[TermFile]
    keys: list[TermFile]
    matrix: Annotated[MatrixFile, AfterValidator(_full)]
    n_pairs: Index


class AttentionFile(TypedDict):
    """attention.json of `sfc attention`, as far as others read it."""

    loadings: LoadingsFile | None
    scores: list[ScoreFile]


def read_attention(folder: Path, digest: str | None) -> list[AttentionFile]:
    """The files beside a circuit with this digest, `attention.json` first; those of another circuit are left out."""
    paths = sorted(folder.glob("attention*.json"), key=lambda path: (len(path.name), path.name))
    results = []
    for path in paths:
        data = read_json(path)
        made_with = data.get("made_with")
        circuit = made_with.get("circuit") if isinstance(made_with, dict) else None
        if circuit in (None, digest) or digest is None:
            results.append(check_type(data, AttentionFile, path))
    return results


def with_traces(graph: FeatureGraph, folder: Path) -> FeatureGraph:
    """The graph with the scores behind its attention nodes, in its metadata, for `graphs.formats.qk_tracing`.

    A node at a token takes the score of its layer for that query whose head and key carry most into it; where no edges
    were split, or none of them reaches it, the first such score.
    """
    files = read_attention(folder, graph.metadata.get("digest"))
    scores = [score for file in files for score in file["scores"] if score["than"] is None]
    edges = [edge for file in files if file["loadings"] for edge in file["loadings"]["edges"]]
    traces: dict[str, QKTracing] = {}
    for node in graph.nodes():
        query = None if node.position is None else str(node.position)
        of_node = [s for s in scores if node.site == f"attn_{s['layer']}" and s["query"] == query]
        if of_node:
            into = [edge for edge in edges if edge["target"] == node.id and edge["site"] == node.site]
            traces[node.id] = _trace(max(of_node, key=lambda score: _carried(score, into)))
    if traces:
        graph.metadata[KEY] = traces
    return graph


def with_attention(graph: FeatureGraph, folder: Path) -> FeatureGraph:
    """The graph with what each feature adds to scores as an attribute of its nodes, `attention`: which head looks
    where, with the features that it pairs with there and what the pair adds.
    """
    in_graph = {node.name for node in graph.nodes()}
    partners: dict[str, dict[str, list[tuple[str, float]]]] = {}
    for score in (score for file in read_attention(folder, graph.metadata.get("digest")) for score in file["scores"]):
        where = f"attn_{score['layer']} head {score['head']}"
        rather = "" if score["than"] is None else f" rather than {score['than']}"
        looks = f"{where} looks from here ({score['query']}) to {score['key']}{rather}"
        is_seen = f"{where} looks here ({score['key']}{rather}) from {score['query']}"
        queries, keys = _words(score["queries"]), _words(score["keys"])
        for pair in score["pairs"]:
            query, key, value = pair["query"], pair["key"], pair["contribution"]
            for name, partner, words, title in ((query, key, keys, looks), (key, query, queries, is_seen)):
                told = partner if partner in in_graph else f"{partner} {words.get(partner, '')}".strip()
                partners.setdefault(name, {}).setdefault(title, []).append((told, value))
    if not partners:
        return graph

    def change(node: Node) -> Node:
        titles = partners.get(node.name) if node.kind == "feature" else None
        if titles is None:
            return node
        strongest = sorted(titles, key=lambda title: -abs(titles[title][0][1]))[:HEADS_OF_A_FEATURE]
        least = LEAST_SHARE * abs(titles[strongest[0]][0][1])
        shown = {title: [row for row in titles[title][:PARTNERS] if abs(row[1]) >= least] for title in strongest}
        attention = {title: rows for title, rows in shown.items() if rows}
        return replace(node, attributes={**node.attributes, "attention": attention})

    return graph.map_nodes(change)


def _words(terms: list[TermFile]) -> dict[str, str]:
    return {term["node"]: " · ".join(word.strip() for word in term["words"]) for term in terms}


def _carried(score: ScoreFile, edges: list[EdgeFile]) -> float:
    """How much of some edges passes through the head from the key."""
    from_key = [edge for edge in edges if edge["source"].endswith(f"@{score['key']}")]
    return sum(abs(edge["heads"][score["head"]]) for edge in from_key if score["head"] < len(edge["heads"]))


def _trace(score: ScoreFile) -> QKTracing:
    query, key = score["query"], score["key"]
    return {
        "pairs": [(f"{p['query']}@{query}", f"{p['key']}@{key}", p["contribution"]) for p in score["pairs"][:TRACED]],
        "queries": [(f"{term['node']}@{query}", term["contribution"]) for term in score["queries"][:TRACED]],
        "keys": [(f"{term['node']}@{key}", term["contribution"]) for term in score["keys"][:TRACED]],
    }
