"""What the report reads of each file of a run, as types that the files are checked against. Numbers are finite; a share
that was not defined is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field, FiniteFloat
from typing_extensions import NotRequired, TypedDict

from circuits.circuit_files import SiteName
from graphs.schema import Count, Index

Share = FiniteFloat | None
Bounds = list[tuple[Share, Share]]
Sizes = Annotated[list[Count], Field(min_length=1, max_length=1000)]


class IntervalsFile(TypedDict):
    """Intervals of the curves over nodes."""

    faithfulness: Bounds
    completeness: Bounds


class CurvesFile(TypedDict):
    """Curves over numbers of nodes: faithfulness.json, and both halves of mask.json."""

    sizes: Sizes
    faithfulness: list[Share]
    completeness: list[Share]
    random: NotRequired[list[list[Share]]]
    intervals: NotRequired[IntervalsFile | None]
    n_nodes: Index
    n_prompts: NotRequired[Index]
    cpr: NotRequired[Share]
    cmd: NotRequired[Share]
    ablation: NotRequired[str]
    start_site: NotRequired[str]


class EdgeCurveFile(TypedDict):
    """A curve over numbers of edges: edge_faithfulness.json."""

    sizes: Sizes
    faithfulness: list[Share]
    random: NotRequired[list[list[Share]]]
    intervals: NotRequired[Bounds | None]
    n_nodes: Index
    n_edges: Index
    all_joined: Share
    ablation: NotRequired[str]
    start_site: NotRequired[str]


def _one_a_size(curves: Mapping[str, Any]) -> Mapping[str, Any]:
    """`ValueError` unless every curve has one value a size."""
    n = len(curves["sizes"])
    lists = [curves[name] for name in ("faithfulness", "completeness") if name in curves] + (curves.get("random") or [])
    intervals = curves.get("intervals") or []
    lists += [intervals] if isinstance(intervals, list) and intervals else []
    lists += [intervals["faithfulness"], intervals["completeness"]] if isinstance(intervals, dict) else []
    if any(len(values) != n for values in lists):
        raise ValueError(f"one value for each of the {n} sizes in every curve")
    return curves


Curves = Annotated[CurvesFile, AfterValidator(_one_a_size)]
EdgeCurve = Annotated[EdgeCurveFile, AfterValidator(_one_a_size)]


class MaskFile(TypedDict):
    """mask.json: the curves of a learned mask beside those of the ranking by effect."""

    mask: Curves
    effects: Curves
    held_out: NotRequired[bool]


def _same_sizes(data: Mapping[str, Any]) -> Mapping[str, Any]:
    if data["mask"]["sizes"] != data["effects"]["sizes"]:
        raise ValueError("the same sizes in mask and effects")
    return data


MaskCurves = Annotated[MaskFile, AfterValidator(_same_sizes)]


class SaeFile(TypedDict):
    """config.json of an autoencoder."""

    site: SiteName
    architecture: NotRequired[str]
    n_features: NotRequired[Index]
    k: NotRequired[FiniteFloat | None]
