"""The JSON of circuit-tracer's and Neuronpedia's graph viewers (schema_version 1), written and read.

The viewers know one number per layer, token positions of one prompt, and transcoder features. A circuit fits thus:

1. `embed`, `attn_l`, `mlp_l`, `resid_l` become rows 0, 3·l+1, 3·l+2 and 3·l+3; the metric is a target logit on the row
   after the last. The true name of a node stands in its `clerp`, the text the viewers show.
2. A position is a place in `prompt_tokens`; when positions are summed there is one for all, and one for the metric:
   circuit-tracer removes what is at more than two thirds of the tokens. Every place has a token node without links,
   since the viewers write a token's name only below such a node.
3. Features have the id `{row}_{feature}_{place}` and, as `feature`, the Cantor pairing of row and feature.
   circuit-tracer gives errors the id `0_{row}_{place}`, which is also the id of feature `row` on row 0; here errors
   are `{row}_-1_{place}`, which no feature can be.
4. `influence` is what the viewers take it for: nodes sorted by |effect|, the share of Σ|effect| up to and including the
   node, so that a node is shown where it is at most the threshold.
5. Supernodes (`graphs.supernodes`) and `metadata["pinned"]` are `qParams`; members are pinned too, since the viewers
   draw pinned nodes alone.
6. `qk_tracing_results` of attention nodes: see `graphs.formats.qk_tracing`.
7. What the schema has no room for stands beside it under `sparse_feature_circuit`, which the viewers ignore and the
   reader uses to rebuild the same graph.

Graphs made by circuit-tracer and by Neuronpedia are read as well: see `graphs.formats.attribution_graph`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from graphs._files import MARK, read_json, write_json
from graphs._outputs import check_output, is_neuronpedia
from graphs.drawing.style import describe, effect_words, number, position_name
from graphs.errors import GraphError
from graphs.feature_graph import NODE_KEYS, SCHEMA_VERSION, FeatureGraph, Node, Position
from graphs.formats.attribution_graph import (
    EMBEDDING,
    ERROR,
    EXTRA,
    FEATURE,
    LOGIT,
    LORSA,
    LORSA_ERROR,
    from_neuronpedia,
)
from graphs.formats.qk_tracing import BIAS, add_qk_tracing
from graphs.formats.qk_tracing import KEY as QK_TRACING
from graphs.sharing import shared

KINDS = ("attn", "mlp", "resid")
OTHER_ERROR = "residual error"
MODEL_IDS = {
    "gpt2": "gpt2-small",
    "meta-llama-3.1-8b": "llama3.1-8b",
    "llama-3.1-8b": "llama3.1-8b",
    "llama-3.1-8b-instruct": "llama3.1-8b-it",
    "llama-3.3-70b-instruct": "llama3.3-70b-it",
}
"""Models that Neuronpedia calls otherwise than the last part of their hub name in lower case."""
NOT_PERMITTED = re.compile(r"[^a-zA-Z0-9_.-]+")
"""What Neuronpedia refuses in `scan` and `slug`."""


@dataclass(frozen=True)
class Viewer:
    """How a viewer is told what a node is: by the kind of its site, feature type and error type."""

    types: dict[str, tuple[str, str]]

    def of(self, node: Node) -> str:
        """The node's feature type."""
        if node.kind == "metric":
            return LOGIT
        feature, error = self.types.get(node.site.partition("_")[0], self.types[""])
        error = self.types[""][1] if node.kind == "skip" else error  # whose text is not written over
        return feature if node.kind == "feature" else error

    def of_name(self, site: str, what: str) -> str:
        """The type of a feature, an error or a bias of a site."""
        feature, error = self.types.get(site.partition("_")[0], self.types[""])
        return {"error": error, BIAS: BIAS}.get(what, feature)


NEURONPEDIA = Viewer({"attn": (LORSA, LORSA_ERROR), "mlp": (FEATURE, ERROR), "": (FEATURE, OTHER_ERROR)})
"""It draws attention as triangles, and writes its own text over that of the errors it knows."""
CIRCUIT_TRACER = Viewer({"": (FEATURE, ERROR)})
"""It shows contexts of transcoder features alone, and draws these errors as diamonds."""


def write_neuronpedia(
    graph: FeatureGraph,
    path: str | Path,
    *,
    scan: str = "",
    slug: str = "",
    features_url: str = "",
    overwrite: bool = False,
) -> None:
    """Write the graph for Neuronpedia; for circuit-tracer's page see `write_circuit_tracer`.

    Args:
        graph: The graph.
        path: The file to write.
        scan: Neuronpedia's id of the model; by default made of `graph.metadata["model"]`.
        slug: Name of the graph there; by default made of its title.
        features_url: Address of a public folder with the feature files that `write_circuit_tracer` makes.
        overwrite: Whether another program's file is replaced.

    Raises:
        GraphError: For a file of another program, or a name with a sign that Neuronpedia does not permit.
    """
    check_output(path, is_neuronpedia, overwrite=overwrite)
    write_json(path, to_neuronpedia(graph, scan=scan, slug=slug, features_url=features_url))


def read_neuronpedia(path: str | Path) -> FeatureGraph:
    """Read an attribution graph as Neuronpedia and circuit-tracer's page have it.

    Args:
        path: Its JSON file.

    Returns:
        The graph, with labels, pinned nodes and supernodes that were saved in a viewer.

    Raises:
        GraphError: With the file and the value, for what is wrong in it.
    """
    return from_neuronpedia(read_json(path, Any), source=path)


def cantor(x: int, y: int) -> int:
    """Cantor pairing (x + y)(x + y + 1) / 2 + y, one number for two."""
    return (x + y) * (x + y + 1) // 2 + y


def to_neuronpedia(
    graph: FeatureGraph, *, scan: str = "", slug: str = "", features_url: str = "", viewer: Viewer = NEURONPEDIA
) -> dict[str, Any]:
    """The graph as the viewers' dictionary; arguments as in `write_neuronpedia`."""
    metadata = shared(graph.metadata)
    traces = metadata.pop(QK_TRACING, {})
    tokens, column_of_position = _columns(graph)
    rows, last = _rows(graph)
    metric_column = len(tokens) - 1
    columns = {node.id: column_of_position.get(node.position, metric_column) for node in graph.nodes()}
    ids = {node.id: _viewer_id(node, rows.get(node.site, last), columns[node.id]) for node in graph.nodes()}
    influence = cumulative_influence(graph)
    nodes = [_token_node(token, column, len(tokens)) for column, token in enumerate(tokens)]
    for node in graph.nodes():
        item = _viewer_node(graph, node, ids[node.id], rows.get(node.site, last), columns[node.id], len(tokens))
        nodes.append({**item, "feature_type": viewer.of(node), "influence": influence.get(node.id)})
    title = str(metadata.get("title") or "feature circuit")
    prompt = "".join(tokens) if graph.metadata.get("tokens") and graph.positions else title
    head = {
        "slug": viewer_name(slug, "slug") or NOT_PERMITTED.sub("-", title.lower()).strip("-.") or "circuit",
        "scan": viewer_name(scan, "scan") or model_id(str(metadata.get("model", ""))),
        "transcoder_list": [],
        "prompt_tokens": tokens,
        "prompt": prompt,
        "node_threshold": 1.0,
        **({"feature_details": {"feature_json_base_url": features_url}} if features_url else {"schema_version": 1}),
        "info": {"generator": {"name": MARK}, "description": _description(graph)},
        EXTRA: {"schema_version": SCHEMA_VERSION, "sites": graph.sites, "metadata": metadata},
    }
    links = [{**edge.to_json(), "source": ids[edge.source], "target": ids[edge.target]} for edge in graph.edges()]
    data = {"metadata": head, "qParams": _viewer_state(graph, ids), "nodes": nodes, "links": links}

    def locate(site: str, position: Position) -> tuple[int, int] | None:
        return (rows[site], column_of_position[position]) if site in rows and position in column_of_position else None

    add_qk_tracing(data, traces, ids, locate, viewer.of_name)
    return data


def viewer_name(name: str, what: str) -> str:
    """A scan or slug as it was given; GraphError for a sign that Neuronpedia does not permit."""
    if sign := NOT_PERMITTED.search(name):
        raise GraphError(
            f"{what} {name!r} holds {sign[0]!r}: Neuronpedia takes letters a to z, digits, and _ . - alone"
        )
    if name and not name.strip("."):
        raise GraphError(f"{what} {name!r} is no name of a file: give one with a letter or a digit")
    return name


def model_id(model: str) -> str:
    """Neuronpedia's id of a model by its name or folder: `meta-llama/Llama-3.1-8B` is `llama3.1-8b`."""
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1].lower()
    return MODEL_IDS.get(last) or NOT_PERMITTED.sub("-", last).strip("-.") or "model"


def cumulative_influence(graph: FeatureGraph) -> dict[str, float]:
    """Share of Σ|effect| that a node and all stronger ones have, by id: near 0 for the strongest of many, 1 for the
    weakest; the metric has none.
    """
    nodes = sorted((node for node in graph.nodes() if node.kind != "metric"), key=lambda node: -abs(node.effect))
    sums = list(accumulate(abs(node.effect) for node in nodes))
    return {node.id: min(1.0, share / sums[-1]) if sums[-1] else 1.0 for node, share in zip(nodes, sums, strict=True)}


def _rows(graph: FeatureGraph) -> tuple[dict[str, int], int]:
    """Row of every site, and of the metric. Neuronpedia takes a largest row of 0 for none."""
    rows = {site: _row(site) for site in graph.sites}
    occurring = {node.site for node in graph.nodes() if node.kind != "metric"}
    if max((rows[site] for site in occurring), default=0) == 0:
        rows = {site: row + 1 for site, row in rows.items()}
    return rows, max(rows.values(), default=0) + 1


def _row(site: str) -> int:
    kind, _, layer = site.partition("_")
    if site == "embed":
        return 0
    if kind not in KINDS or not layer.isdecimal():
        raise GraphError(f"site {site!r} has no row in the viewer: allowed are embed, attn_N, mlp_N and resid_N")
    return 3 * int(layer) + KINDS.index(kind) + 1


def _columns(graph: FeatureGraph) -> tuple[list[str], dict[Position, int]]:
    """The prompt's tokens and the place of every position among them; nodes without one share a place of their own.

    Token positions keep their number; named positions stand in their order. The metric is read at the last place.
    """
    positions = graph.positions
    tokens = [str(token) for token in graph.metadata.get("tokens", ())] if positions else []
    columns: dict[Position, int] = {}
    if all(isinstance(position, int) for position in positions):
        columns = {position: int(position) for position in positions}
        tokens += [str(column) for column in range(len(tokens), max(columns.values(), default=-1) + 1)]
    else:
        columns = {position: column for column, position in enumerate(positions)}
        tokens = [position_name(graph, position) for position in positions]
    if not positions or any(node.position is None and node.kind != "metric" for node in graph.nodes()):
        columns[None] = len(tokens)
        tokens.append("all positions")
    return (tokens if len(tokens) > 1 else [*tokens, "metric"]), columns


def _viewer_id(node: Node, row: int, column: int) -> str:
    if node.kind == "metric":
        return f"{row}_0_{column}"
    return f"{row}_{node.feature if node.kind == 'feature' else -1 if node.kind == 'error' else -2}_{column}"


def _viewer_node(graph: FeatureGraph, node: Node, id: str, row: int, column: int, n_tokens: int) -> dict[str, Any]:
    is_feature = node.kind == "feature"
    number_of_feature = 0 if node.kind == "metric" else -1
    return {
        "node_id": id,
        "feature": cantor(row, int(node.feature or 0)) if is_feature else number_of_feature,
        "layer": str(row),
        "ctx_idx": column,
        "jsNodeId": f"{id.rsplit('_', 1)[0]}-0" if is_feature else "-".join(id.rsplit("_", 1)),
        "clerp": _clerp(graph, node),
        "token_prob": 1.0 if node.kind == "metric" else 0.0,
        "is_target_logit": node.kind == "metric",
        "run_idx": 0,
        "reverse_ctx_idx": n_tokens - 1 - column,
        "activation": _activation(graph, node),
        EXTRA: {key: getattr(node, key) for key in NODE_KEYS},
    }


def _clerp(graph: FeatureGraph, node: Node) -> str:
    """A node's text. Of a logit the viewers read the name, in double quotes, and the probability."""
    effect = number(node.effect) if effect_words(graph, node) else ""
    meaning = describe(graph, node)
    if node.kind == "metric":
        return f'Output "{meaning.replace(chr(34), chr(39))}" (p=1.000)'
    named = f"{node.name} {meaning}" if node.kind == "feature" or node.label else node.name
    return f"{named.rstrip()} ({effect})"


def _description(graph: FeatureGraph) -> str:
    """Words on the numbers, for the viewer's page about the graph."""
    metric = graph.metadata.get("metric") or "the metric"
    return (
        f"A number behind a name is its effect on {metric}: what that gains when the node goes from its clean to its "
        "patch value."
    )


def _activation(graph: FeatureGraph, node: Node) -> float | None:
    """The activation on the prompts: as stored, or the mean over cases at the node's position."""
    if node.attributes.get("activation") is not None:
        return node.attributes["activation"]
    here = "" if node.position is None else str(node.position)
    cases = graph.metadata.get("cases") or {}
    values = {case: spans[here] for case, spans in node.attributes.get("by_case", {}).items() if here in spans}
    sizes = {case: cases.get(case, 1) if isinstance(cases, dict) else 1 for case in values}
    total = sum(sizes.values())
    return sum(values[case] * sizes[case] for case in values) / total if total else None


def _token_node(token: str, column: int, n_tokens: int) -> dict[str, Any]:
    """A node that makes the viewers write a token's name."""
    return {
        "node_id": f"E_{column}_{column}",
        "feature": column,
        "layer": "E",
        "ctx_idx": column,
        "feature_type": EMBEDDING,
        "jsNodeId": f"E_{column}-{column}",
        "clerp": f'Emb: "{token}"',
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": n_tokens - 1 - column,
        "influence": None,
        "activation": None,
    }


def _viewer_state(graph: FeatureGraph, ids: dict[str, str]) -> dict[str, Any]:
    """Pinned nodes and supernodes, by the viewers' ids."""
    supernodes = graph.supernodes
    pinned = [*graph.metadata.get("pinned", ()), *(id for members in supernodes.values() for id in members)]
    return {
        "pinnedIds": [ids[id] for id in dict.fromkeys(pinned) if id in ids],
        "supernodes": [[name, *(ids[id] for id in members)] for name, members in supernodes.items()],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
