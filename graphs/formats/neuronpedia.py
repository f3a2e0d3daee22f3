"""The JSON of circuit-tracer's and Neuronpedia's graph viewers (schema_version 1), written and read.

The viewers know one number per layer, token positions of one prompt, and transcoder features. A circuit fits thus:

1. `attn_l`, `mlp_l`, `resid_l` become rows 3·l, 3·l+1, 3·l+2; `embed` is row "E"; the metric is a target logit on the
   row after the last. The true name of a node stands in its `clerp`, the text the viewers show.
2. A position is a place in `prompt_tokens`; when positions are summed there is one place for all.
3. Features have the id `{row}_{feature}_{place}` and, as `feature`, the Cantor pairing of row and feature.
   circuit-tracer gives errors the id `0_{row}_{place}`, which is also the id of feature `row` on row 0; here errors
   are `{row}_-1_{place}`, which no feature can be.
4. What the schema has no room for stands beside it under `sparse_feature_circuit`, which the viewers ignore and the
   reader uses to rebuild the same graph.

Graphs made by circuit-tracer itself are read as well: see `from_neuronpedia`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from typing_extensions import NotRequired, TypedDict

from graphs._files import check_type, read_json, write_json
from graphs._outputs import check_output, is_neuronpedia
from graphs.drawing.style import describe, effect_words, number, position_name
from graphs.errors import GraphError
from graphs.feature_graph import (
    METRIC,
    NODE_KEYS,
    SCHEMA_VERSION,
    FeatureGraph,
    Node,
    Position,
    error_node,
    feature_node,
    metric_node,
)
from graphs.schema import GraphHead, Index, Interval, NodeFile, TokenPosition
from graphs.sharing import shared

EXTRA = "sparse_feature_circuit"
KINDS = ("attn", "mlp", "resid")
FEATURE, ERROR, EMBEDDING, LOGIT = "cross layer transcoder", "mlp reconstruction error", "embedding", "logit"


def write_neuronpedia(
    graph: FeatureGraph, path: str | Path, *, scan: str = "", slug: str = "", overwrite: bool = False
) -> None:
    """Write the graph for the viewers; `scan` is their name of the model, `slug` of the graph.

    A GraphError refuses to replace another program's file, unless `overwrite`.
    """
    check_output(path, is_neuronpedia, overwrite=overwrite)
    write_json(path, to_neuronpedia(graph, scan=scan, slug=slug))


def read_neuronpedia(path: str | Path) -> FeatureGraph:
    """Read a graph file of the viewers; what is wrong in it raises GraphError with the file and the value."""
    return from_neuronpedia(read_json(path, Any), source=path)


def cantor(x: int, y: int) -> int:
    """Cantor pairing (x + y)(x + y + 1) / 2 + y, one number for two."""
    return (x + y) * (x + y + 1) // 2 + y


# --- writing ----------------------------------------------------------------------------------------------------------


def to_neuronpedia(graph: FeatureGraph, *, scan: str = "", slug: str = "") -> dict[str, Any]:
    """The graph as the viewers' dictionary."""
    tokens, position_places = _places(graph)
    rows = {site: _row(site) for site in graph.sites}
    last = max((row for row in rows.values() if row is not None), default=-1) + 1
    places = {node.id: position_places.get(node.position, len(tokens) - 1) for node in graph.nodes()}
    ids = {node.id: _viewer_id(node, rows.get(node.site), places[node.id], last) for node in graph.nodes()}
    metadata = shared(graph.metadata)
    title = str(metadata.get("title") or "feature circuit")
    return {
        "metadata": {
            "slug": slug or re.sub(r"\W+", "-", title.lower()).strip("-"),
            "scan": scan or str(metadata.get("model", "")),
            "transcoder_list": [],
            "prompt_tokens": tokens,
            "prompt": "".join(tokens),
            "node_threshold": 1.0,
            "schema_version": 1,
            EXTRA: {"schema_version": SCHEMA_VERSION, "sites": graph.sites, "metadata": metadata},
        },
        "qParams": {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""},
        "nodes": [
            _viewer_node(graph, node, ids[node.id], rows.get(node.site), places[node.id], last, len(tokens))
            for node in graph.nodes()
        ],
        "links": [{**edge.to_json(), "source": ids[edge.source], "target": ids[edge.target]} for edge in graph.edges()],
    }


def _row(site: str) -> int | None:
    """Row of a site, None for the embedding."""
    kind, _, layer = site.partition("_")
    if site == "embed":
        return None
    if kind not in KINDS or not layer.isdecimal():
        raise GraphError(f"site {site!r} has no row in the viewer: allowed are embed, attn_N, mlp_N and resid_N")
    return 3 * int(layer) + KINDS.index(kind)


def _places(graph: FeatureGraph) -> tuple[list[str], dict[Position, int]]:
    """The prompt's tokens and the place of every position among them; nodes without one share a place of their own.

    Token positions keep their number; named positions stand in their order.
    """
    positions = graph.positions
    tokens = [str(token) for token in graph.metadata.get("tokens", ())] if positions else []
    places: dict[Position, int] = {}
    if all(isinstance(position, int) for position in positions):
        places = {position: int(position) for position in positions}
        tokens += [str(place) for place in range(len(tokens), max(places.values(), default=-1) + 1)]
    else:
        places = {position: place for place, position in enumerate(positions)}
        tokens = [position_name(graph, position) for position in positions]
    if not positions or any(node.position is None and node.kind != "metric" for node in graph.nodes()):
        places[None] = len(tokens)
        tokens.append("all positions")
    return tokens, places


def _viewer_id(node: Node, row: int | None, place: int, last: int) -> str:
    if node.kind == "metric":
        return f"{last + 1}_0_{place}"
    return f"{'E' if row is None else row}_{-1 if node.feature is None else node.feature}_{place}"


def _viewer_node(
    graph: FeatureGraph, node: Node, id: str, row: int | None, place: int, last: int, n_tokens: int
) -> dict[str, Any]:
    layer, type_, feature = ("E" if row is None else str(row)), FEATURE, -1
    if node.kind == "metric":
        layer, type_, feature = str(last + 1), LOGIT, 0
    elif node.kind == "error":
        type_ = ERROR
    elif row is None:
        type_, feature = EMBEDDING, int(node.feature or 0)
    else:
        feature = cantor(row, int(node.feature or 0))
    meaning = describe(graph, node)
    shown = f"{node.name} {meaning}" if node.kind == "feature" and meaning else meaning
    return {
        "node_id": id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": place,
        "feature_type": type_,
        "jsNodeId": "-".join(id.rsplit("_", 1)) if type_ != FEATURE else f"{id.rsplit('_', 1)[0]}-0",
        "clerp": f"{shown} ({number(node.effect)})" if effect_words(graph, node) else shown,
        "token_prob": 1.0 if node.kind == "metric" else 0.0,
        "is_target_logit": node.kind == "metric",
        "run_idx": 0,
        "reverse_ctx_idx": n_tokens - 1 - place,
        "influence": abs(node.effect),
        "activation": node.attributes.get("activation"),
        EXTRA: {key: getattr(node, key) for key in NODE_KEYS},
    }


# --- reading ----------------------------------------------------------------------------------------------------------


class _Link(TypedDict):
    source: str
    target: str
    weight: FiniteFloat
    interval: NotRequired[Interval | None]
    by_case: NotRequired[dict[str, FiniteFloat] | None]


class _OwnNode(TypedDict):
    node_id: str
    sparse_feature_circuit: NodeFile


class _OwnHead(TypedDict):
    sparse_feature_circuit: GraphHead


class _OwnGraph(TypedDict):
    metadata: _OwnHead
    nodes: list[_OwnNode]
    links: list[_Link]


class _ForeignNode(TypedDict):
    node_id: str
    layer: str | Index
    feature_type: str
    ctx_idx: TokenPosition
    influence: NotRequired[FiniteFloat | None]
    token_prob: NotRequired[FiniteFloat | None]
    activation: NotRequired[FiniteFloat | None]
    clerp: NotRequired[str | None]


class _ForeignHead(TypedDict):
    prompt_tokens: list[str]
    slug: NotRequired[str]
    scan: NotRequired[str]
    prompt: NotRequired[str]


class _ForeignGraph(TypedDict):
    metadata: _ForeignHead
    nodes: list[_ForeignNode]
    links: list[_Link]


def from_neuronpedia(data: Any, *, source: str | Path = "graph") -> FeatureGraph:
    """Rebuild a graph written by `to_neuronpedia`, or take over one made by circuit-tracer.

    Of the latter, transcoder features and errors of layer l sit at site `mlp_l`, tokens at `embed`, every logit at
    `logit`, joined to the metric by an edge of its probability; effects are the file's influences.
    """
    head = data.get("metadata") if isinstance(data, dict) else None
    is_ours = isinstance(head, dict) and EXTRA in head
    check_type(data, _OwnGraph if is_ours else _ForeignGraph, f"{source}: not a graph of the Neuronpedia schema")
    try:
        return _own(data, source) if is_ours else _foreign(data)
    except KeyError as error:
        raise GraphError(f"{source}: a link names the node {error}, and there is none") from None
    except ValueError as error:
        prefix = "" if str(error).startswith(str(source)) else f"{source}: "
        raise GraphError(f"{prefix}{error}") from None


def _own(data: dict[str, Any], source: str | Path) -> FeatureGraph:
    names = {node["node_id"]: node[EXTRA]["id"] for node in data["nodes"]}
    edges = [{**link, "source": names[link["source"]], "target": names[link["target"]]} for link in data["links"]]
    nodes = [node[EXTRA] for node in data["nodes"]]
    return FeatureGraph.from_json({**data["metadata"][EXTRA], "nodes": nodes, "edges": edges}, source=source)


def _foreign(data: dict[str, Any]) -> FeatureGraph:
    items = data["nodes"]
    layers = sorted({int(n["layer"]) for n in items if n["feature_type"] in (FEATURE, ERROR)})
    metadata = {key: data["metadata"][key] for key in ("slug", "scan", "prompt") if key in data["metadata"]}
    metadata |= {"title": metadata.get("prompt", "attribution graph"), "tokens": data["metadata"]["prompt_tokens"]}
    graph = FeatureGraph(["embed", *(f"mlp_{layer}" for layer in layers), "logit"], metadata=metadata)
    graph.add_node(metric_node())
    names = {}
    for item in items:
        node = _foreign_node(item)
        graph.add_node(node)
        names[item["node_id"]] = node.id
        if item["feature_type"] == LOGIT:
            graph.add_edge(node.id, METRIC, float(item.get("token_prob") or 0.0))
    for link in data["links"]:
        graph.add_edge(names[link["source"]], names[link["target"]], float(link["weight"]))
    return graph


def _foreign_node(item: dict[str, Any]) -> Node:
    effect = float(item.get("influence") or 0.0)
    position = int(item["ctx_idx"])
    kind = item["feature_type"]
    if kind == ERROR:
        return error_node(f"mlp_{int(item['layer'])}", effect=effect, position=position)
    numbers = str(item["node_id"]).split("_")
    if len(numbers) != 3 or not numbers[1].isdecimal():
        raise GraphError(f"node_id {item['node_id']!r} is not of the form layer_feature_position")
    site = {EMBEDDING: "embed", LOGIT: "logit"}.get(kind) or f"mlp_{int(item['layer'])}"
    activation = item.get("activation")
    attributes = {} if activation is None else {"activation": activation}
    node = feature_node(site, int(numbers[1]), effect=effect, position=position, **attributes)
    return Node(**{**{key: getattr(node, key) for key in NODE_KEYS}, "label": item.get("clerp") or None})
