"""Circuits beside each other as a table, for JSON, for the terminal and as a page with both on it."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from circuits.comparison.options import CompareCircuitsOptions
from circuits.comparison.overlap import Overlap
from graphs import explore
from graphs.drawing.dot import to_svg
from graphs.feature_graph import FeatureGraph
from sae._frames import Result, frame_text

SENTENCES = {
    "same": "the same mechanism",
    "partly": "the same mechanism in part",
    "different": "different mechanisms",
    "unknown": "not decided: that needs transfer and shuffles",
}


@dataclass(frozen=True)
class Transfer:
    """One circuit's nodes on another circuit's prompts."""

    carried: float
    """Faithfulness of the one circuit's nodes, in its own model and autoencoders."""
    own: float
    """Faithfulness of as many of the other's own strongest nodes."""
    translated: float | None
    """Faithfulness of the partners of the one's nodes in the other's autoencoders; None where these are the same."""

    @property
    def share(self) -> float:
        """The share of what the other circuit's nodes carry that these carry; 0 where the other's carry nothing."""
        return self.carried / self.own if self.own > 0 else 0.0


@dataclass(frozen=True)
class PairOfCircuits:
    """Two circuits beside each other."""

    first: str
    """Name of the first circuit."""
    second: str
    """Name of the second circuit."""
    n: int
    """Nodes of each that were compared."""
    matched: float | None
    """Share of the second's |effect| on features that have a partner in the first; None for the same autoencoders."""
    similarity: float | None
    """Mean similarity of the pairs tried as partners, weighted by |effect|; None for the same autoencoders."""
    overlap: Overlap
    """Overlap of nodes and edges, and chance."""
    there: Transfer | None
    """The first's nodes on the second's prompts; None where not measured."""
    back: Transfer | None
    """The second's nodes on the first's prompts."""
    verdict: str
    """same, partly, different or unknown; see `circuits.comparison.circuits`."""
    graphs: tuple[FeatureGraph, FeatureGraph] = field(repr=False)
    """Both circuits in the names of the first."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON, without the graphs; undefined numbers are None."""
        data = asdict(replace(self, graphs=()))  # type: ignore[arg-type]
        del data["graphs"]
        for key in ("there", "back"):
            if (transfer := getattr(self, key)) is not None:
                data[key]["share"] = transfer.share
        return _without_nan(data) | {"sentence": self.sentence}

    @property
    def sentence(self) -> str:
        """The verdict with the numbers it rests on."""
        nodes = self.overlap.nodes
        chance = "" if nodes.p is None else f" (by chance {nodes.chance:.2f}, p {nodes.p:.2g})"
        sentence = (
            f"{self.first} and {self.second}: {SENTENCES[self.verdict]}. Nodes overlap by {nodes.value:.2f}{chance}"
        )
        if self.there is None or self.back is None:
            return f"{sentence}."
        return (
            f"{sentence}; {self.first} carries {self.there.share:.0%} of what {self.second}'s own nodes do on its "
            f"prompts, and {self.second} {self.back.share:.0%} the other way."
        )

    def picture(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write one page with both circuits: what is in the first alone, in both, and in the second alone."""
        title = f"{self.first} and {self.second}"
        page = explore(self.graphs[0], path, title=title, compare_with=self.graphs[1], overwrite=overwrite)
        assert isinstance(page, Path)
        return page


@dataclass(frozen=True)
class CircuitComparison(Result):
    """Circuits beside each other, every two of them."""

    pairs: list[PairOfCircuits]
    """One for every two circuits."""
    options: CompareCircuitsOptions
    """How they were compared."""

    def to_frame(self) -> pd.DataFrame:
        """A row for every two circuits: overlap of nodes and edges with chance and p, correlations of effects, and
        transfer in shares of the behaviour.
        """
        return pd.DataFrame([_row(pair) for pair in self.pairs])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; undefined numbers are None."""
        return {
            "schema_version": 1,
            "options": asdict(self.options),
            "pairs": [pair.to_dict() for pair in self.pairs],
        }

    def text(self) -> str:
        """The table, and a verdict a line."""
        table = frame_text(self.to_frame(), {"shared": 0})
        return "\n".join([table, "", *(pair.sentence for pair in self.pairs)])

    def _repr_html_(self) -> str:
        """The table, and the two circuits of the first pair."""
        drawings = "".join(f"<div>{to_svg(graph, nodes=30, edges=100)}</div>" for graph in self.pairs[0].graphs)
        return f'{super()._repr_html_()}<div style="display: flex">{drawings}</div>'


def _row(pair: PairOfCircuits) -> dict[str, Any]:
    nodes, edges, there, back = pair.overlap.nodes, pair.overlap.edges, pair.there, pair.back
    return {
        "first": pair.first,
        "second": pair.second,
        "verdict": pair.verdict,
        "shared": pair.overlap.shared,
        "nodes": nodes.value,
        "by chance": nodes.chance,
        "p": nodes.p,
        "edges": None if edges is None else edges.value,
        "edges p": None if edges is None else edges.p,
        "pearson": pair.overlap.pearson.value,
        "spearman": pair.overlap.spearman,
        "partners": pair.similarity,
        "first on second": None if there is None else there.carried,
        "as partners": None if there is None else there.translated,
        "second's own": None if there is None else there.own,
        "second on first": None if back is None else back.carried,
        "as its partners": None if back is None else back.translated,
        "first's own": None if back is None else back.own,
    }


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
