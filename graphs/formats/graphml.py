"""GraphML, for Gephi, Cytoscape, yEd and every other graph program.

1. Nodes carry `site`, `kind`, `feature`, `position`, `effect` and `label` as plain columns; edges carry `weight`.
2. What GraphML has no type for (attributes, metadata, the order of sites) is kept as JSON text in the column `json`,
   from which `read_graphml` rebuilds the same graph.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import networkx as nx

from graphs._files import atomic_write, marked, parse_json, read_text
from graphs._outputs import check_output, has_mark
from graphs.drawing.style import describe, visible
from graphs.errors import GraphError
from graphs.feature_graph import NODE_KEYS, SCHEMA_VERSION, FeatureGraph
from graphs.sharing import shared


def write_graphml(graph: FeatureGraph, path: str | Path, *, overwrite: bool = False) -> None:
    """Write the graph as GraphML, for networkx, Gephi and others.

    Args:
        graph: The graph.
        path: The file.
        overwrite: Whether another program's file is replaced.

    Raises:
        GraphError: For another program's file there, unless `overwrite`.
    """
    check_output(path, has_mark(".graphml"), overwrite=overwrite)
    plain = nx.DiGraph()
    rest = {"schema_version": SCHEMA_VERSION, "sites": graph.sites, "metadata": shared(graph.metadata)}
    plain.graph["json"] = json.dumps(rest)  # ASCII only: XML cannot hold control characters, escapes in JSON can
    names = {node.id: f"n{number}" for number, node in enumerate(graph.nodes())}
    for node in graph.nodes():
        columns = {
            "name": visible(node.id),
            "label": describe(graph, node) or visible(node.name),
            "site": node.site,
            "kind": node.kind,
            "effect": float(node.effect),
            "json": json.dumps({key: getattr(node, key) for key in NODE_KEYS}),
        }
        optional = {"feature": node.feature, "position": None if node.position is None else visible(str(node.position))}
        plain.add_node(names[node.id], **columns, **{k: v for k, v in optional.items() if v is not None})
    for edge in graph.edges():
        bounds = {} if edge.interval is None else {"low": edge.interval[0], "high": edge.interval[1]}
        cases = {"by_case": json.dumps(edge.by_case)} if edge.by_case else {}
        plain.add_edge(names[edge.source], names[edge.target], weight=edge.weight, **bounds, **cases)
    with atomic_write(path) as temporary:
        nx.write_graphml_xml(plain, temporary)
        temporary.write_bytes(marked(temporary.read_bytes(), ".graphml"))


def read_graphml(path: str | Path) -> FeatureGraph:
    """Read a graph that `write_graphml` wrote.

    Args:
        path: The file.

    Returns:
        The graph.

    Raises:
        GraphError: With what is missing, for any other GraphML file, and for a file that is none.
    """
    plain = _parsed(path)
    data = _json(plain.graph, "the graph", path)
    nodes = {name: _json(columns, f"node {name!r}", path) for name, columns in plain.nodes(data=True)}
    try:
        data["nodes"] = list(nodes.values())
        data["edges"] = [
            {
                "source": nodes[u]["id"],
                "target": nodes[v]["id"],
                "weight": float(columns["weight"]),
                "interval": [columns["low"], columns["high"]] if "low" in columns else None,
                "by_case": _json(columns, f"edge {u!r} -> {v!r}", path, "by_case") if "by_case" in columns else None,
            }
            for u, v, columns in plain.edges(data=True)
        ]
    except KeyError as error:
        raise GraphError(f"{path}: key {error} is missing") from None
    return FeatureGraph.from_json(data, source=path)


def _parsed(path: str | Path) -> nx.DiGraph:
    """Parse the file with networkx; whatever it raises, the file is no GraphML."""
    text = read_text(path)
    try:
        return nx.parse_graphml(text)
    except Exception as error:
        raise GraphError(f"{path}: not a GraphML file ({error})") from None


def _json(columns: dict[str, Any], owner: str, path: str | Path, name: str = "json") -> dict[str, Any]:
    """A column of JSON of a node, an edge or the graph."""
    if not isinstance(columns.get(name), str):
        raise GraphError(f"{path}: {owner} has no column {name!r}, which write_graphml adds")
    return parse_json(columns[name], f"{path}: column {name!r} of {owner}", dict[str, Any])
