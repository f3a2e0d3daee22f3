"""Results of `sfc attention`: pairs of features behind a score, and heads behind edges."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from sae._frames import Result, frame_text

PAIRS_KEPT = 50
"""Pairs, and features of a side, that a file holds; the rest is one number."""
PAIRS_SHOWN = 10
"""Pairs that the terminal shows."""
HEADS_SHOWN = 6
"""Heads that it shows."""


@dataclass(frozen=True)
class QKPair:
    """A pair of features, errors or biases behind a score."""

    query: str
    """What is read at the query's token: `resid_1/120`, `resid_1/error` or `resid_1/bias`."""
    key: str
    """What is read at the key's token."""
    contribution: float
    """Part of the score, mean over prompts (0 where the pair does not occur)."""
    share: float = 1.0
    """In which share of the prompts it occurs; of both keys together where two are compared, up to 2."""


@dataclass(frozen=True)
class QKTerm:
    """All pairs of one feature of the query's or of the key's side."""

    node: str
    """The feature."""
    contribution: float
    """Their sum, mean over prompts."""
    words: list[str] = field(default_factory=list)
    """The prompts' tokens, there, that the feature is strongest on."""


@dataclass(frozen=True)
class HeadAttention:
    """How much a head attends to a token."""

    layer: int
    """Its layer."""
    head: int
    """Its number."""
    weight: float
    """Mean attention to the key."""
    than_weight: float | None = None
    """Mean attention to the other token, where two are compared."""


@dataclass(frozen=True, repr=False)
class QKAttribution(Result):
    """The score of one head for a query and a key, split over pairs of features."""

    layer: int
    """Layer of the attention."""
    head: int
    """The head."""
    site: str
    """Site whose features the layer reads."""
    query: str
    """The token that looks."""
    key: str
    """The token that is looked at."""
    than: str | None
    """The token whose score is taken away; None where the score itself is explained."""
    n_prompts: int
    """Prompts in the means."""
    left_out: int
    """Prompts without these tokens."""
    score: float
    """Mean score before the softmax (less that of the other key): what all pairs add up to."""
    weight: float
    """Mean attention to the key, after the softmax."""
    than_weight: float | None
    """Mean attention to the other token."""
    softcap: float | None
    """Where the model caps scores, c tanh(score / c); what is explained is the score before it."""
    pairs: list[QKPair] = field(default_factory=list)
    """All pairs, the largest first."""
    queries: list[QKTerm] = field(default_factory=list)
    """Their sums by what is read at the query."""
    keys: list[QKTerm] = field(default_factory=list)
    """Their sums by what is read at the key."""

    @property
    def title(self) -> str:
        """`attn_2 head 1 from last to subject rather than attractor`."""
        rather = "" if self.than is None else f" rather than {self.than}"
        return f"attn_{self.layer} head {self.head} from {self.query} to {self.key}{rather}"

    def to_frame(self) -> pd.DataFrame:
        """One row a pair: query, key, contribution and share."""
        return pd.DataFrame([asdict(pair) for pair in self.pairs], columns=["query", "key", "contribution", "share"])

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON with the largest pairs, and the sum of the others as `rest`."""
        data = {**asdict(self), "title": self.title}
        for name in ("pairs", "queries", "keys"):
            data[name] = data[name][:PAIRS_KEPT]
        table = self.matrix()
        data["matrix"] = {"queries": [*table.index], "keys": [*table.columns], "values": table.to_numpy().tolist()}
        return data | {"n_pairs": len(self.pairs), "rest": sum(p.contribution for p in self.pairs[PAIRS_KEPT:])}

    def matrix(self, n: int = 6) -> pd.DataFrame:
        """The pairs of the n largest features at the query (rows) and at the key (columns), the others added up as
        `others`: all cells add up to the score.
        """
        pairs = self.to_frame()
        for side, terms in (("query", self.queries), ("key", self.keys)):
            names = [term.node for term in terms[:n]]
            pairs[side] = pairs[side].where(pairs[side].isin(names), "others")
        table = pairs.pivot_table("contribution", "query", "key", aggfunc="sum", fill_value=0.0)
        rows, columns = ([term.node for term in terms[:n]] + ["others"] for terms in (self.queries, self.keys))
        return table.reindex(index=rows, columns=columns, fill_value=0.0)

    def plot(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Draw the largest pairs as a coloured table.

        Args:
            path: The file to write: .svg, .png or .pdf.
            overwrite: Whether a file is replaced that this program did not write.

        Returns:
            The path.

        Raises:
            UserError: For a file of another program, unless `overwrite`, or a link.
        """
        from circuits.discovery.attention.plots import Side, plot_pairs

        table = self.matrix()
        than = "" if self.than is None else f" less {self.than}"
        return plot_pairs(
            path, table.to_numpy(), title=f"{self.title}: {self.score:+.2f} before the softmax",
            rows=Side(f"at the {self.query}", _labels(self.queries, table.index)),
            columns=Side(f"at the {self.key}{than}", _labels(self.keys, table.columns)), overwrite=overwrite,
        )  # fmt: skip

    def text(self) -> str:
        """The score and the attention, the largest pairs, and the largest features of either side."""
        kind = "score" if self.than is None else "difference of scores"
        weights = f"attention {self.weight:.3f}"
        weights += "" if self.than is None else f", {self.than_weight:.3f} to {self.than}"
        cap = "" if self.softcap is None else f"; before the soft cap at {self.softcap:g}"
        head = f"{self.title}: {kind} {self.score:+.3f}, {weights} ({self.n_prompts} prompts{cap})"
        return "\n".join([head, *self._tables()])

    def _tables(self) -> Iterable[str]:
        sides = [{term.node: _spoken(term) for term in terms} for terms in (self.queries, self.keys)]
        shown = self.to_frame().head(PAIRS_SHOWN)[["query", "key", "contribution"]]
        rest = self.score - float(shown["contribution"].sum())
        for side, names in zip(("query", "key"), sides, strict=True):
            shown[side] = shown[side].map(names)
        others = {"query": f"{len(self.pairs) - len(shown)} other pairs", "key": "", "contribution": rest}
        shown.loc[len(shown)] = others
        yield frame_text(shown)
        rows = [
            (_spoken(q), q.contribution, _spoken(k), k.contribution)
            for q, k in zip(self.queries[:PAIRS_SHOWN], self.keys[:PAIRS_SHOWN], strict=False)
        ]
        yield frame_text(pd.DataFrame(rows, columns=["at the query", "sum", "at the key", "sum "]))


def _labels(terms: Iterable[QKTerm], names: Iterable[str]) -> list[list[str]]:
    """Numbers of features, each with the first two tokens it is on."""
    words = {term.node: [word.strip() for word in term.words[:2]] for term in terms}
    return [[name.rpartition("/")[2], *words.get(name, [])] for name in names]


def _spoken(term: QKTerm) -> str:
    """The name of a feature with the tokens it is on."""
    return f"{term.node} {' · '.join(word.strip() for word in term.words)}".strip()


@dataclass(frozen=True)
class EdgeLoading:
    """One edge into or out of an attention site, split over its heads."""

    source: str
    """The node that it comes from."""
    target: str
    """The node that it goes to, or `metric`."""
    site: str
    """The attention site whose heads it is split over: that of the target, or that of the source."""
    weight: float
    """The edge: mean over prompts, in units of the metric."""
    heads: list[float]
    """Share of the weight that passes through each head."""
    rest: float
    """Share that passes through none: with the heads' it adds up to the edge."""

    @property
    def is_into(self) -> bool:
        """Whether the heads are those of the target's site."""
        return self.target.startswith(f"{self.site}/")


@dataclass(frozen=True, repr=False)
class HeadLoadings(Result):
    """The strongest edges into and out of attention sites, split over heads."""

    edges: list[EdgeLoading]
    """The strongest first; an edge from one attention site to another is there twice."""
    n_prompts: int
    """Prompts in the means."""

    def to_frame(self) -> pd.DataFrame:
        """One row an edge: source, target, heads of (the site), weight, a column for each head, and rest."""
        rows = [
            {
                "source": edge.source, "target": edge.target, "heads of": edge.site, "weight": edge.weight,
                **{f"head {number}": value for number, value in enumerate(edge.heads)}, "rest": edge.rest,
            }
            for edge in self.edges
        ]  # fmt: skip
        table = pd.DataFrame(rows)
        return table[[*(name for name in table if name != "rest"), "rest"]] if rows else table

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    def text(self) -> str:
        """A row an edge."""
        if not self.edges:
            return "no edge of this circuit goes into or out of an attention site"
        return f"edges into and out of attention, by head ({self.n_prompts} prompts)\n{frame_text(self.to_frame())}"


@dataclass(frozen=True, repr=False)
class AttentionReport(Result):
    """Heads behind edges, and features behind scores."""

    loadings: HeadLoadings | None
    """Edges by head; None where one score was asked for."""
    scores: list[QKAttribution]
    """Scores by pairs of features."""
    looking: list[HeadAttention]
    """How much every head attends to the key that was asked for, the most first."""

    def to_frame(self) -> pd.DataFrame:
        """One row a pair of each score: where (head, query, key), query, key, contribution and share."""
        frames = [score.to_frame().assign(where=score.title) for score in self.scores]
        columns = ["where", "query", "key", "contribution", "share"]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema_version": 1,
            "loadings": None if self.loadings is None else self.loadings.to_dict(),
            "scores": [score.to_dict() for score in self.scores],
            "looking": [asdict(row) for row in self.looking],
        }

    def text(self) -> str:
        """The edges by head, the heads that look at the key, and the scores."""
        blocks = [] if self.loadings is None else [self.loadings.text()]
        if self.looking:
            shown = pd.DataFrame([asdict(row) for row in self.looking[:HEADS_SHOWN]]).dropna(axis="columns")
            names = {"weight": f"to {self.scores[0].key}", "than_weight": f"to {self.scores[0].than}"}
            blocks.append(f"attention from {self.scores[0].query}\n{frame_text(shown.rename(columns=names))}")
        blocks += [score.text() for score in self.scores]
        if self.loadings is not None and self.loadings.edges and not self.scores:
            by_token = any("@" in edge.source for edge in self.loadings.edges)
            blocks.append(
                "no score is split over features: no edge from one token to another enters the attention of a layer "
                "whose input has an autoencoder in this circuit"
                if by_token
                else "this circuit adds up positions: give --query and --key to see why a head looks from one to the "
                "other"
            )
        return "\n\n".join(blocks)
