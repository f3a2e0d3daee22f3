"""The format of a graph on disk, as types that `graphs._files` checks files against.

A file may have more keys than these: only what some code relies on is named. Numbers are finite.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, FiniteFloat
from typing_extensions import NotRequired, TypedDict

SCHEMA_VERSION = 1
LARGEST = 2**31 - 1
"""No index or count in a file is larger."""

Colour = Literal["class", "effect"]
"""What colours of nodes stand for: the class of prompts a feature is on for, or the sign of its effect."""

Index = Annotated[int, Field(ge=0, le=LARGEST)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
TokenPosition = Annotated[int, Field(ge=0, le=2**20)]
"""A token's position; every position up to the last is listed somewhere."""
Interval = tuple[FiniteFloat, FiniteFloat]
Scored = list[str | tuple[str, FiniteFloat]]
"""Tokens, each alone or with a number."""


class ContextFile(TypedDict):
    """A stretch of text on which a feature fires."""

    tokens: list[str]
    activations: list[FiniteFloat]
    peak: NotRequired[Index | None]
    change: NotRequired[list[FiniteFloat | None]]


def _one_a_token(context: ContextFile) -> ContextFile:
    n = len(context["tokens"])
    if len(context["activations"]) != n:
        raise ValueError(f"one activation for each of the {n} tokens")
    if len(context.get("change", context["activations"])) != n:
        raise ValueError(f"one change for each of the {n} tokens")
    if (context.get("peak") or 0) >= max(n, 1):
        raise ValueError(f"a peak among the {n} tokens")
    return context


Contexts = list[Annotated[ContextFile, AfterValidator(_one_a_token)]]


class HistogramFile(TypedDict, total=False):
    """Counts of values between edges; empty where there is nothing to count."""

    edges: list[FiniteFloat]
    counts: list[FiniteFloat]


class SampleFile(TypedDict):
    """Contexts drawn from an interval of activation."""

    low: FiniteFloat
    high: FiniteFloat
    share: FiniteFloat
    contexts: Contexts


class AttributesFile(TypedDict, total=False):
    """Attributes of a node beside its effect; see `graphs.feature_graph.Node`."""

    activation: FiniteFloat | None
    exact_effect: FiniteFloat | None
    density: FiniteFloat | None
    max_activation: FiniteFloat | None
    mean_activation: FiniteFloat | None
    disagrees: str
    interval: Interval
    contexts: Contexts | None
    top_tokens: Scored | None
    by_case: dict[str, dict[str, FiniteFloat]]
    top_logits: Scored | None
    bottom_logits: Scored | None
    neighbours: list[tuple[Index, FiniteFloat]] | None
    quantiles: list[tuple[FiniteFloat, FiniteFloat]]
    histogram: HistogramFile
    logit_histogram: HistogramFile
    samples: list[SampleFile]
    random: Contexts
    similar: dict[str, list[tuple[str, FiniteFloat]]]
    prompt_peaks: dict[str, list[FiniteFloat]]
    attention: dict[str, list[tuple[str, FiniteFloat]]]
    automatic_label: str


class NodeFile(TypedDict):
    """A node; that its fields fit each other is checked by `graphs.feature_graph.Node`."""

    id: str
    site: str
    feature: Index | None
    kind: Literal["feature", "error", "skip", "metric"]
    position: TokenPosition | str | None
    effect: FiniteFloat
    label: str | None
    attributes: AttributesFile


class EdgeFile(TypedDict):
    """An edge between two nodes of the file."""

    source: str
    target: str
    weight: FiniteFloat
    interval: NotRequired[Interval | None]
    by_case: NotRequired[dict[str, FiniteFloat] | None]


class SupernodeFile(TypedDict):
    """A named group of nodes, as the explorer saves it too."""

    name: str
    nodes: list[str]
    collapsed: NotRequired[bool]
    automatic: NotRequired[bool]


class MetadataFile(TypedDict, total=False):
    """Metadata of a graph that the drawings read."""

    title: str | None
    metric: str | None
    method: str | None
    total_effect: FiniteFloat | None
    tokens: list[str]
    positions: list[str]
    span_words: dict[str, list[str]]
    last_span: str | None
    supernodes: list[SupernodeFile]
    pinned: list[str]


class GraphFile(TypedDict):
    """A graph as `FeatureGraph.to_json` writes it."""

    schema_version: Literal[1]
    metadata: MetadataFile
    sites: list[str]
    nodes: list[NodeFile]
    edges: list[EdgeFile]


class GraphHead(TypedDict):
    """A graph without its nodes and edges, as other formats carry it beside their own."""

    schema_version: Literal[1]
    metadata: MetadataFile
    sites: list[str]
