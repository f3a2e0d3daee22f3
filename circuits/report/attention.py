"""The report's tables of `sfc attention`: edges by head, and each score as a table of pairs, coloured by size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from circuits.discovery.attention.stored import EdgeFile, ScoreFile, TermFile
from circuits.report.files import RunFiles
from graphs.drawing.style import describe, visible

EDGES_SHOWN = 5
"""Edges into attention, and out of it."""
STRONGEST = 60
"""Per cent of ink in the cell of the largest number."""


@dataclass(frozen=True)
class Cell:
    """A number with how much colour it has."""

    value: float
    ink: int
    """Per cent."""


@dataclass(frozen=True)
class Named:
    """A feature of one side of a score, and in words what it is on."""

    name: str
    words: str


@dataclass(frozen=True)
class Score:
    """A score: what the file says, and a table of pairs, rows at the query and columns at the key."""

    data: ScoreFile
    columns: list[Named]
    rows: list[tuple[Named, list[Cell]]]


def attention_block(run: RunFiles) -> dict[str, Any] | None:
    """Edges by head and scores by pairs of features; None where nobody asked."""
    if not run.attention:
        return None
    loadings = next((file["loadings"] for file in run.attention if file["loadings"]), None)
    all_edges = loadings["edges"] if loadings else []
    into = [edge for edge in all_edges if edge["target"].startswith(f"{edge['site']}/")]
    edges = [*into[:EDGES_SHOWN], *[edge for edge in all_edges if edge not in into][:EDGES_SHOWN]]
    n_heads = max((len(edge["heads"]) for edge in edges), default=0)
    meaning = {node.name: describe(run.graph, node) for node in run.graph.nodes()} if run.graph else {}
    scores = [_score(score, meaning) for file in run.attention for score in file["scores"]]
    return {"heads": range(n_heads), "edges": [_edge(edge, n_heads) for edge in edges], "scores": scores}


def _edge(edge: EdgeFile, n_heads: int) -> tuple[EdgeFile, list[Cell | None]]:
    """An edge with a cell a head and one for the rest; none for a head that its site lacks."""
    cells = _cells([*edge["heads"], edge["rest"]], max(abs(edge["weight"]), 1e-12))
    return edge, [*cells[:-1], *[None] * (n_heads - len(edge["heads"])), cells[-1]]


def _score(score: ScoreFile, meaning: dict[str, str]) -> Score:
    words = [_words(score[side]) for side in ("queries", "keys")]  # type: ignore[literal-required]

    def named(name: str, of_side: dict[str, str]) -> Named:
        return Named(name, of_side.get(name) or meaning.get(name, ""))

    matrix = score["matrix"]
    largest = max((abs(value) for row in matrix["values"] for value in row), default=0.0) or 1.0
    rows = [
        (named(name, words[0]), _cells(row, largest))
        for name, row in zip(matrix["queries"], matrix["values"], strict=True)
    ]
    return Score(score, [named(name, words[1]) for name in matrix["keys"]], rows)


def _words(terms: Sequence[TermFile]) -> dict[str, str]:
    return {term["node"]: " · ".join(map(visible, term["words"])) for term in terms}


def _cells(values: Sequence[float], largest: float) -> list[Cell]:
    return [Cell(value, min(STRONGEST, round(STRONGEST * abs(value) / largest))) for value in values]
