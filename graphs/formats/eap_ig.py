"""The circuit JSON of EAP-IG, which is also that of MIB's submissions (Hanna et al. 2024; Mueller et al. 2025).

Their graph has one node a component: `input`, attention heads `a0.h3`, MLPs `m0`, `logits`; an edge joins every pair
through the residual stream, three (`<q>`, `<k>`, `<v>`) into a head. A feature circuit is projected onto it:

1. Features and errors of `embed`, `attn_l`, `mlp_l` become `input`, `a{l}.h*`, `m{l}`; the metric becomes `logits`.
2. Residual features are no components: each is taken out, its edges joined. With w(u, g) / effect(g) the share of g's
   change that is due to u, the path u -> g -> d carries w(g, d) w(u, g) / effect(g).
3. The score of a component's node is the sum of its features' effects, of an edge the sum of all weights that fall on
   it. What the features do not tell apart, heads and the q, k and v inputs, shares the score evenly, so that sums are
   right. What has a score is `in_graph`.
4. The feature graph itself stands beside it under `sparse_feature_circuit`, which their loaders ignore and the reader
   uses to rebuild the same graph.

Files made by EAP-IG are read as well: see `from_eap_ig`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, FiniteFloat
from typing_extensions import NotRequired, TypedDict

from graphs._files import check_type, read_json, write_json
from graphs._outputs import check_output, is_eap_ig
from graphs.errors import GraphError
from graphs.feature_graph import METRIC, FeatureGraph, Node, feature_node, metric_node
from graphs.sharing import shared

EXTRA = "sparse_feature_circuit"
INPUT, LOGITS = "input", "logits"
NAME = re.compile(r"input|logits|m(?P<mlp>\d+)|a(?P<attn>\d+)\.h(?P<head>\d+)")
Pair = tuple[str, str]
"""Two components, the first upstream of the second."""
Weights = dict[Pair, float]
FeatureKey = tuple[str, int]
"""(site, feature)"""


def write_eap_ig(graph: FeatureGraph, path: str | Path, *, overwrite: bool = False, **model: Any) -> None:
    """Write the graph for EAP-IG and MIB.

    Args:
        graph: The graph.
        path: The JSON file.
        overwrite: Whether another program's file is replaced.
        model: The model's numbers, as in `to_eap_ig`.

    Raises:
        GraphError: For another program's file there, unless `overwrite`.
    """
    check_output(path, is_eap_ig, overwrite=overwrite)
    write_json(path, to_eap_ig(graph, **model))


def read_eap_ig(path: str | Path) -> FeatureGraph:
    """Read a circuit of EAP-IG or MIB.

    Args:
        path: Its JSON file.

    Returns:
        The circuit: heads and MLPs as nodes, with the scores of edges as weights.

    Raises:
        GraphError: With the file and the value, for what is wrong in it.
    """
    return from_eap_ig(read_json(path, Any), source=path)


# --- writing ----------------------------------------------------------------------------------------------------------


def to_eap_ig(
    graph: FeatureGraph, *, n_layers: int, n_heads: int, d_model: int, parallel: bool = False
) -> dict[str, Any]:
    """The graph as EAP-IG's dictionary, with all components and edges of a model of this shape.

    parallel: attention and MLP of a layer read the same residual stream, so no edge joins them.
    """
    scores = _node_scores(graph)
    weights = _component_weights(graph)
    heads = {f"a{layer}": [f"a{layer}.h{head}" for head in range(n_heads)] for layer in range(n_layers)}
    members = {INPUT: [INPUT], LOGITS: [LOGITS], **{f"m{layer}": [f"m{layer}"] for layer in range(n_layers)}, **heads}
    for name in {*scores, *(end for pair in weights for end in pair)}:
        if name not in members:
            raise GraphError(f"the graph has component {name!r}: a model of {n_layers} layers has none")
    nodes = {
        part: {"in_graph": name in scores or name == LOGITS, "score": scores.get(name, 0.0) / len(members[name])}
        for name in _components(n_layers)
        for part in members[name]
    }
    edges: dict[str, dict[str, Any]] = {}
    for source, target in _pairs(n_layers, parallel=parallel):
        total = weights.pop((source, target), 0.0)
        names = [name for start in members[source] for end in members[target] for name in _edge_names(start, end)]
        edges |= {name: {"score": total / len(names), "in_graph": total != 0} for name in names}
    if weights:
        source, target = next(iter(weights))
        raise GraphError(f"edge {source} -> {target} does not exist where attention and MLP are parallel")
    shape = {"n_layers": n_layers, "n_heads": n_heads, "parallel_attn_mlp": parallel, "d_model": d_model}
    return {"cfg": shape, "nodes": nodes, "edges": edges, EXTRA: graph.to_json() | {"metadata": shared(graph.metadata)}}


def component_edges(n_layers: int, n_heads: int, *, parallel: bool = False) -> dict[Pair, list[str]]:
    """Every pair of components that the residual stream joins, heads one by one -> the names of its edges."""
    heads = {f"a{layer}": [f"a{layer}.h{head}" for head in range(n_heads)] for layer in range(n_layers)}
    return {
        (start, end): _edge_names(start, end)
        for source, target in _pairs(n_layers, parallel=parallel)
        for start in heads.get(source, [source])
        for end in heads.get(target, [target])
    }


def _edge_names(source: str, target: str) -> list[str]:
    """The edge between two components; the three into a head, by query, key and value."""
    letters = [f"<{letter}>" for letter in "qkv"] if target.startswith("a") else [""]
    return [f"{source}->{target}{letter}" for letter in letters]


def _components(n_layers: int) -> list[str]:
    return [INPUT, *(f"{kind}{layer}" for layer in range(n_layers) for kind in "am"), LOGITS]


def _pairs(n_layers: int, *, parallel: bool) -> Iterator[tuple[str, str]]:
    """Every pair of components that the residual stream joins."""
    names = _components(n_layers)
    for number, target in enumerate(names):
        for source in names[:number]:
            if not (parallel and target == f"m{source[1:]}" and source.startswith("a")):
                yield source, target


def _component(node: Node) -> str | None:
    """`input`, `a3`, `m3` or `logits`; None for the residual stream."""
    if node.kind == "metric":
        return LOGITS
    kind, _, layer = node.site.partition("_")
    if node.site == "embed":
        return INPUT
    if kind not in ("attn", "mlp", "resid") or not layer.isdecimal():
        raise GraphError(f"site {node.site!r} is no component: allowed are embed, attn_N, mlp_N and resid_N")
    return None if kind == "resid" else f"{kind[0]}{int(layer)}"


def _node_scores(graph: FeatureGraph) -> dict[str, float]:
    scores: dict[str, float] = defaultdict(float)
    for node in graph.nodes():
        name = _component(node)
        if name is not None and node.kind != "metric":
            scores[name] += node.effect
    return dict(scores)


def _component_weights(graph: FeatureGraph) -> Weights:
    """Weights between components, the residual features taken out one by one in the order of the model."""
    name_of = {node.id: _component(node) or node.id for node in graph.nodes()}
    into: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # target -> source -> weight
    out: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))  # source -> target -> weight

    def add(source: str, target: str, weight: float) -> None:
        into[target][source] += weight
        out[source][target] += weight

    for source, target, weight, *_ in graph.edges():
        add(name_of[source], name_of[target], weight)
    residual = [node for node in graph.nodes() if _component(node) is None]
    for node in sorted(residual, key=lambda node: graph.rank(node.id)):
        sources, targets = into.pop(node.id, {}), out.pop(node.id, {})
        for source in sources:
            del out[source][node.id]
        for target in targets:
            del into[target][node.id]
        if node.effect:
            for source, before in sources.items():
                for target, after in targets.items():
                    add(source, target, before * after / node.effect)
    return {(source, target): weight for source, ends in out.items() for target, weight in ends.items() if weight}


# --- reading ----------------------------------------------------------------------------------------------------------


class _Config(TypedDict):
    n_layers: Annotated[int, Field(ge=1, le=10_000)]


class _Edge(TypedDict):
    in_graph: bool
    score: FiniteFloat


class _Node(TypedDict):
    in_graph: bool
    score: NotRequired[float | None]


class _Circuit(TypedDict):
    cfg: _Config
    nodes: dict[str, _Node]
    edges: dict[str, _Edge]


def from_eap_ig(data: Any, *, source: str | Path = "circuit") -> FeatureGraph:
    """Rebuild a graph written by `to_eap_ig`, or take over what is `in_graph` of a circuit of heads and MLPs.

    Of the latter, head h of layer l is feature h of site `attn_l`, the MLP feature 0 of `mlp_l`, the input feature 0
    of `embed`; q, k and v edges are added up. A node without a score has the sum of its outgoing edges as its effect.
    """
    check_type(data, _Circuit, f"{source}: not a circuit of EAP-IG")
    if "nodes" in data.get(EXTRA, ()):
        return FeatureGraph.from_json(data[EXTRA], source=source)
    try:
        return _foreign(data)
    except ValueError as error:
        raise GraphError(f"{source}: {error}") from None


def _foreign(data: dict[str, Any]) -> FeatureGraph:
    weights: dict[tuple[FeatureKey, FeatureKey], float] = defaultdict(float)
    for name, edge in data["edges"].items():
        tail, arrow, head = name.partition("->")
        if not arrow:
            raise GraphError(f"edge {name!r} is not of the form parent->child")
        if edge["in_graph"]:
            weights[_place(tail), _place(head.partition("<")[0])] += float(edge["score"])
    leaving: dict[FeatureKey, float] = defaultdict(float)
    for (start, _), weight in weights.items():
        leaving[start] += weight
    in_graph: dict[FeatureKey, dict[str, Any]] = {
        _place(name): node for name, node in data["nodes"].items() if node["in_graph"] and name != LOGITS
    }
    joined: set[FeatureKey] = {end for pair in weights for end in pair} - {(METRIC, 0)}
    sites = ["embed", *(f"{kind}_{layer}" for layer in range(int(data["cfg"]["n_layers"])) for kind in ("attn", "mlp"))]
    if beyond := sorted({site for site, _ in {*in_graph, *joined}} - {*sites}):
        raise GraphError(f"a node of {beyond[0]} is in the graph, and n_layers is {data['cfg']['n_layers']}")
    graph = FeatureGraph(sites, metadata={"cfg": data["cfg"], "title": "component circuit"})
    for site, index in sorted({*in_graph, *joined}, key=lambda key: (sites.index(key[0]), key[1])):
        key = (site, index)
        score: Any = in_graph.get(key, {}).get("score")
        unscored = score is None or math.isnan(score)
        graph.add_node(feature_node(site, index, effect=leaving[key] if unscored else float(score)))
    graph.add_node(metric_node())
    for (start, end), weight in weights.items():
        graph.add_edge(_id(start), _id(end), weight)
    return graph


def _place(name: str) -> FeatureKey:
    """(site, feature) of a component's name."""
    match = NAME.fullmatch(name)
    if match is None:
        raise GraphError(f"node {name!r}: expected input, logits, m0 or a0.h0")
    if name in (INPUT, LOGITS):
        return ("embed", 0) if name == INPUT else (METRIC, 0)
    if match["mlp"]:
        return f"mlp_{int(match['mlp'])}", 0
    return f"attn_{int(match['attn'])}", int(match["head"])


def _id(key: FeatureKey) -> str:
    return METRIC if key[0] == METRIC else f"{key[0]}/{key[1]}"
