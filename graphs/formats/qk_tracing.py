"""Why attention looks there, in Neuronpedia's graph: `qk_tracing_results` of attention nodes.

`graph.metadata["qk_tracing"]` says for the id of a node which nodes make up the score by which its head looks where it
does: `pairs` [query node, key node, contribution], and the sums `queries` and `keys` [node, contribution]. The viewer
wants them by its own ids; nodes that the graph does not have stand in `qk_only_nodes`, errors and biases too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from typing_extensions import TypedDict

from graphs.feature_graph import Position

KEY = "qk_tracing"
"""Entry of the metadata."""
BIAS = "bias"
_NAME = re.compile(r"(?P<site>\w+)/(?P<what>\d+|error|bias)(@(?P<position>.+))?")


class QKTracing(TypedDict):
    """The score behind an attention node, the largest contributions first."""

    pairs: list[tuple[str, str, float]]
    queries: list[tuple[str, float]]
    keys: list[tuple[str, float]]


Locate = Callable[[str, Position], tuple[int, int] | None]
"""Site and position -> row and place in the viewer; None where it has none."""
Describe = Callable[[str, str], str]
"""Site and feature, error or bias -> the viewer's feature type."""


def add_qk_tracing(
    data: dict[str, Any], traces: Mapping[str, QKTracing], ids: Mapping[str, str], locate: Locate, kind: Describe
) -> None:
    """Add `qk_tracing_results` to the nodes of the viewer's dictionary, and `qk_only_nodes` for what they name beside.

    Args:
        data: the graph as the viewer's dictionary, which is changed.
        traces: by id of a node.
        ids: the viewer's id of every node of the graph, by id.
        locate: where a node is drawn.
        kind: what it is drawn as.
    """
    by_id = {item["node_id"]: item for item in data["nodes"]}
    others: dict[str, dict[str, Any]] = {}

    def viewer_id(name: str) -> str | None:
        if name in ids:
            return ids[name]
        match = _NAME.fullmatch(name)
        position = match["position"] if match else None
        where = match and locate(match["site"], int(position) if position and position.isdecimal() else position)
        if not match or not where:
            return None
        row, column = where
        number = {"error": "-1", BIAS: "-3"}.get(match["what"], match["what"])
        id = f"{row}_{number}_{column}"
        others[id] = {
            "node_id": id, "feature_type": kind(match["site"], match["what"]), "layer": str(row), "ctx_idx": column,
            "jsNodeId": f"{row}_{number}-0", "clerp": f"{match['site']}/{match['what']}",
        }  # fmt: skip
        return id

    def translated(row: tuple[Any, ...]) -> list[Any] | None:
        *names, value = row
        viewer_ids = [viewer_id(name) for name in names]
        return None if None in viewer_ids else [*viewer_ids, value]

    for id, trace in traces.items():
        if id in ids:
            rows = {name: [row for item in trace[name] if (row := translated(item))] for name in trace}  # type: ignore[literal-required]
            by_id[ids[id]]["qk_tracing_results"] = {
                "pair_wise_contributors": rows["pairs"],
                "top_q_marginal_contributors": rows["queries"],
                "top_k_marginal_contributors": rows["keys"],
            }
    if others:
        data["qk_only_nodes"] = others
