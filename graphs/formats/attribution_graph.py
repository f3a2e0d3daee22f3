"""Reading the JSON of circuit-tracer's and Neuronpedia's graph viewers; `graphs.formats.neuronpedia` writes it.

Three kinds of files are told apart by what is in them:

1. Ours hold the graph under `sparse_feature_circuit`. What was changed in a viewer and saved there counts: labels
   (`clerps`), pinned nodes and supernodes of `qParams`.
2. circuit-tracer's, which is also Neuronpedia's first engine: transcoder features and errors of layer l are at `mlp_l`,
   tokens at `embed`, logits at `logit`, each joined to the metric by an edge of its probability.
3. Neuronpedia's second engine (llamascopium): attention is made of features as well ("lorsa"), which are at `attn_l`;
   biases and what it does not know have a site of their own before the layer, `bias_attn_bO_3`.

`influence` in such a file is cumulative: the share of all influence that the node and all stronger ones have. The
effect of a node is its own share, the difference to the next stronger one's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from typing_extensions import NotRequired, TypedDict

from graphs._files import check_type
from graphs.errors import GraphError
from graphs.feature_graph import METRIC, FeatureGraph, Node, error_node, feature_node, metric_node
from graphs.schema import GraphHead, Index, Interval, NodeFile, TokenPosition

EXTRA = "sparse_feature_circuit"
FEATURE, ERROR = "cross layer transcoder", "mlp reconstruction error"
LORSA, LORSA_ERROR = "lorsa", "lorsa error"
EMBEDDING, LOGIT = "embedding", "logit"
SITES = {FEATURE: "mlp", ERROR: "mlp", LORSA: "attn", LORSA_ERROR: "attn"}


class _Link(TypedDict):
    source: str
    target: str
    weight: FiniteFloat
    interval: NotRequired[Interval | None]
    by_case: NotRequired[dict[str, FiniteFloat] | None]


class _State(TypedDict, total=False):
    """State that a viewer saves; circuit-tracer's page saves lists as text."""

    pinnedIds: list[str] | str | None
    supernodes: list[list[str]] | str | None
    clerps: list[list[str]] | str | None


class _OwnNode(TypedDict):
    node_id: str
    feature: NotRequired[int | None]
    layer: NotRequired[str | int]
    sparse_feature_circuit: NotRequired[NodeFile]


class _OwnHead(TypedDict):
    sparse_feature_circuit: GraphHead


class _OwnGraph(TypedDict):
    metadata: _OwnHead
    nodes: list[_OwnNode]
    links: list[_Link]
    qParams: NotRequired[_State]


class _ForeignNode(TypedDict):
    node_id: str
    layer: Index | str
    feature_type: str
    ctx_idx: TokenPosition
    feature: NotRequired[int | None]
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
    qParams: NotRequired[_State]


def from_neuronpedia(data: Any, *, source: str | Path = "graph") -> FeatureGraph:
    """Rebuild a graph written by `to_neuronpedia`, or take over one made by circuit-tracer or Neuronpedia.

    Args:
        data: The JSON value of the file.
        source: Names the file in error messages.

    Returns:
        The graph, with `metadata["supernodes"]` and `metadata["pinned"]` where the file has them.

    Raises:
        GraphError: With the file and the value, for what is no such graph, or a damaged one.
    """
    head = data.get("metadata") if isinstance(data, dict) else None
    is_ours = isinstance(head, dict) and EXTRA in head
    check_type(data, _OwnGraph if is_ours else _ForeignGraph, f"{source}: not a graph of the Neuronpedia schema")
    try:
        graph, names = _own(data, source) if is_ours else _foreign(data)
        return _with_state(graph, data, names)
    except KeyError as error:
        raise GraphError(f"{source}: a link names the node {error}, and there is none") from None
    except ValueError as error:
        prefix = "" if str(error).startswith(str(source)) else f"{source}: "
        raise GraphError(f"{prefix}{error}") from None


# --- ours -------------------------------------------------------------------------------------------------------------


def _own(data: dict[str, Any], source: str | Path) -> tuple[FeatureGraph, dict[str, str]]:
    """The graph, and the id of every node by that in the file; token nodes are the viewers' alone."""
    nodes = {node["node_id"]: node[EXTRA] for node in data["nodes"] if EXTRA in node}
    names = {id: node["id"] for id, node in nodes.items()}
    edges = [{**link, "source": names[link["source"]], "target": names[link["target"]]} for link in data["links"]]
    head = {**data["metadata"][EXTRA], "nodes": list(nodes.values()), "edges": edges}
    return FeatureGraph.from_json(head, source=source), names


# --- circuit-tracer's and Neuronpedia's -------------------------------------------------------------------------------


def _foreign(data: dict[str, Any]) -> tuple[FeatureGraph, dict[str, str]]:
    items = data["nodes"]
    metadata = {key: data["metadata"][key] for key in ("slug", "scan", "prompt") if key in data["metadata"]}
    metadata |= {"title": metadata.get("prompt", "attribution graph"), "tokens": data["metadata"]["prompt_tokens"]}
    shares = _own_shares(items)
    nodes = {item["node_id"]: _foreign_node(item, shares.get(item["node_id"], 0.0)) for item in items}
    graph = FeatureGraph(_in_order({node.site for node in nodes.values()}), metadata=metadata)
    graph.add_node(metric_node())
    for node in nodes.values():
        graph.add_node(node)
    names = {id: node.id for id, node in nodes.items()}
    for item in items:
        if item["feature_type"] == LOGIT:
            graph.add_edge(names[item["node_id"]], METRIC, float(item.get("token_prob") or 0.0))
    for link in data["links"]:
        graph.add_edge(names[link["source"]], names[link["target"]], float(link["weight"]))
    return graph, names


def _own_shares(items: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Each node's own share of the influence, from the cumulative ones."""
    influences = [(float(item["influence"]), item["node_id"]) for item in items if item.get("influence") is not None]
    shares, before = {}, 0.0
    for influence, id in sorted(influences):
        shares[id], before = influence - before, influence
    return shares


def _in_order(sites: Iterable[str]) -> list[str]:
    """Sites in the order of the forward pass: the embedding, of each layer biases, attention and MLP, the logits."""

    def rank(site: str) -> tuple[int, int, str]:
        kind, _, layer = site.rpartition("_")
        if site in ("embed", "logit"):
            return (-1 if site == "embed" else 2**31, 0, site)
        return int(layer), {"attn": 1, "mlp": 2}.get(kind, 0), site

    return sorted({"embed", "logit", *sites}, key=rank)


def _foreign_node(item: dict[str, Any], effect: float) -> Node:
    id, kind, position = str(item["node_id"]), item["feature_type"], int(item["ctx_idx"])
    if kind in (ERROR, LORSA_ERROR):
        return error_node(f"{SITES[kind]}_{_layer(item)}", effect=effect, position=position)
    fields = id.split("_")
    if kind in (EMBEDDING, LOGIT, FEATURE, LORSA):
        if len(fields) not in (3, 4) or not fields[-2].isdecimal():
            raise GraphError(f"node_id {id!r} is not of the form layer_feature_position")
        site = {EMBEDDING: "embed", LOGIT: "logit"}.get(kind) or f"{SITES[kind]}_{_layer(item)}"
        feature = int(fields[-2])
    else:  # a bias, or what llamascopium has no name for: layer_what_position
        site, feature = f"{'_'.join(fields[1:-1]) or kind}_{_layer(item)}", 0
    effect = float(item.get("token_prob") or 0.0) if kind == LOGIT else effect
    activation = item.get("activation")
    attributes = {} if activation is None else {"activation": activation}
    node = feature_node(site, feature, effect=effect, position=position, **attributes)
    return replace(node, label=item.get("clerp") or None)


def _layer(item: Mapping[str, Any]) -> int:
    try:
        return int(item["layer"])
    except ValueError:
        raise GraphError(f"layer of node {item['node_id']!r} is {item['layer']!r}: it must be a number") from None


# --- what was saved in a viewer ---------------------------------------------------------------------------------------


def _with_state(graph: FeatureGraph, data: dict[str, Any], names: Mapping[str, str]) -> FeatureGraph:
    """The graph with the labels, pinned nodes and supernodes that the file has now."""
    state = data.get("qParams") or {}
    groups = _listed(state.get("supernodes"))
    supernodes = {str(name): [names[id] for id in ids if id in names] for name, *ids in filter(None, groups)}
    members = {id for ids in supernodes.values() for id in ids}
    before = graph.metadata.get("pinned", ())
    pinned = [names[id] for id in _listed(state.get("pinnedIds")) if id in names]
    entries = {
        "supernodes": [{**_as_before(graph, name), "name": name, "nodes": ids} for name, ids in supernodes.items()],
        "pinned": [id for id in pinned if id in before or id not in members],
    }
    graph = graph.with_labels(_saved_labels(data, _listed(state.get("clerps")), names))
    saved = {key: value for key, value in entries.items() if value or key in graph.metadata}
    graph.metadata = {**graph.metadata, **saved}
    return graph


def _as_before(graph: FeatureGraph, name: str) -> dict[str, Any]:
    """The supernode of this name as it was written, with what the viewers do not know of it."""
    groups = graph.metadata.get("supernodes", ())
    return next((group for group in groups if group["name"] == name), {})


def _saved_labels(data: dict[str, Any], clerps: Iterable[Any], names: Mapping[str, str]) -> dict[str, str]:
    """Labels given in a viewer, by id: circuit-tracer names a node by its `feature`, Neuronpedia by
    `layer_feature_place`.
    """
    by_feature = {str(key): str(label) for key, label, *_ in (entry for entry in clerps if len(entry) > 1) if label}
    labels = {}
    for item in data["nodes"] if by_feature else ():
        keys = str(item.get("feature")), f"{item.get('layer')}_{item.get('feature')}_{item.get('ctx_idx')}"
        if item["node_id"] in names and (label := by_feature.get(keys[1]) or by_feature.get(keys[0])):
            labels[names[item["node_id"]]] = label
    return labels


def _listed(value: Any) -> list[Any]:
    """A list as it is, or from the text that circuit-tracer's page makes of it: JSON, or ids between commas."""
    if isinstance(value, list):
        return value
    text = value or ""
    with suppress(ValueError):
        return parsed if isinstance(parsed := json.loads(text), list) else []
    return [part for part in text.split(",") if part]
