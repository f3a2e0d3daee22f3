"""The feature graph: what a circuit is once the model has been put away.

1. Nodes are features (`resid_3/120`), SAE errors (`resid_3/error`), what skip connections of transcoders write
   (`mlp_3/skip`) and one output node (`metric`); each carries its effect on the metric and, in a circuit by position,
   where it sits (`resid_3/120@5`).
2. Edges run from a site to a later one, weighted by how much of the metric's change passes along them. Sites are
   kept in the model's forward order, so the graph has no cycles.
3. `metadata` is free; what draws the graph reads `title`, `metric` (what the number means), `tokens` (the header of
   position 0, 1, ...), `positions` (the order of named spans), `span_words` (some words of each span),
   `total_effect` (None where there is none: the metric's effect is not shown then), `cases` (the order of the cases
   of `by_case`), `faithfulness` (lists `sizes` and `faithfulness`: measured circuits of so many nodes), `supernodes`
   (list of `name` and `nodes`, ids) and `pinned` (ids).

The graph itself is a `networkx.DiGraph` at `.graph`: every networkx algorithm applies to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import networkx as nx

from graphs._files import check_type, read_json, write_json
from graphs._outputs import check_output, is_graph
from graphs.errors import GraphError, unknown
from graphs.schema import SCHEMA_VERSION, GraphFile

if TYPE_CHECKING:
    import pandas as pd

METRIC = "metric"
KINDS = ("feature", "error", "skip", "metric")
OTHERS = ("error", "skip")
"""Kinds of nodes of a site that are no features: their id names the kind in place of an index."""
NODE_KEYS = ("id", "site", "feature", "kind", "position", "effect", "label", "attributes")

Position = int | str | None


def node_id(site: str, what: int | str, position: Position = None) -> str:
    """`resid_3/120`, `resid_3/error`, and with a position `resid_3/120@5` or `resid_3/120@subject`."""
    return f"{site}/{what}" + ("" if position is None else f"@{position}")


@dataclass(frozen=True)
class Node:
    """One node of the circuit."""

    id: str
    """`resid_3/120`, `resid_3/error`, `resid_3/120@5` or `metric`."""
    site: str
    """The site the node lives at, `resid_3`; `metric` for the output node."""
    feature: int | None
    """Index of the feature in its SAE; None for errors, skip connections and the output node."""
    kind: Literal["feature", "error", "skip", "metric"]
    """Kind of node."""
    position: Position = None
    """Token position or span name, None when positions are summed."""
    effect: float = 0.0
    """Indirect effect on the metric; for the output node the total effect."""
    label: str | None = None
    """A person's label of the feature."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Anything else, plain JSON: activation, exact_effect, density, top_tokens, top_logits, bottom_logits, contexts,
    by_case ({case: {span, or "" where positions are summed: mean activation}}).
    """

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise GraphError(f"node {self.id!r} has kind {self.kind!r}: allowed are {', '.join(KINDS)}")
        if self.kind == "metric":
            expected = METRIC
        else:
            if (self.feature is None) != (self.kind in OTHERS):
                raise GraphError(f"node {self.id!r} of kind {self.kind!r} has feature {self.feature!r}")
            expected = node_id(self.site, self.kind if self.feature is None else self.feature, self.position)
        if self.id != expected:
            raise GraphError(f"node id {self.id!r} does not match its fields, which spell {expected!r}")
        if not math.isfinite(self.effect):
            raise GraphError(f"effect of {self.id} is {self.effect}: it must be a finite number")

    @property
    def name(self) -> str:
        """The id without the position: `resid_3/120`."""
        if self.kind == "metric":
            return METRIC
        return node_id(self.site, self.kind if self.feature is None else self.feature)


def feature_node(site: str, feature: int, *, effect: float, position: Position = None, **attributes: Any) -> Node:
    """A feature's node with its id spelt out; `attributes` are stored as they are."""
    return Node(node_id(site, feature, position), site, feature, "feature", position, effect, None, attributes)


def error_node(site: str, *, effect: float, position: Position = None, **attributes: Any) -> Node:
    """An error's node with its id spelt out; `attributes` are stored as they are."""
    return Node(node_id(site, "error", position), site, None, "error", position, effect, None, attributes)


def skip_node(site: str, *, effect: float, position: Position = None, **attributes: Any) -> Node:
    """The node of what a transcoder's skip connection writes, with its id spelt out."""
    return Node(node_id(site, "skip", position), site, None, "skip", position, effect, None, attributes)


def metric_node(*, effect: float = 0.0, **attributes: Any) -> Node:
    """The output node; `attributes` are stored as they are."""
    return Node(METRIC, METRIC, None, "metric", None, effect, None, attributes)


class Edge(NamedTuple):
    """One edge of the circuit."""

    source: str
    """Id of the upstream node."""
    target: str
    """Id of the downstream node."""
    weight: float
    """How much of the change of the metric passes along the edge."""
    interval: tuple[float, float] | None = None
    """Lower and upper bound of the weight, where they are known."""
    by_case: dict[str, float] | None = None
    """Mean weight on the prompts of each case, where they are known."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; without what is not known."""
        entries = {"source": self.source, "target": self.target, "weight": self.weight}
        interval = {} if self.interval is None else {"interval": list(self.interval)}
        return {**entries, **interval, **({"by_case": self.by_case} if self.by_case else {})}


def _bounds(interval: Sequence[float] | None) -> dict[str, float]:
    return {} if interval is None else {"low": interval[0], "high": interval[1]}


class FeatureGraph:
    """Nodes, weighted edges, the sites in model order, and free metadata.

    Nothing that reads a graph changes it: pruning and labelling return new graphs.
    """

    def __init__(self, sites: Iterable[str], *, metadata: Mapping[str, Any] | None = None) -> None:
        self.sites: list[str] = list(sites)
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.graph = nx.DiGraph()
        self._rank = {site: rank for rank, site in enumerate(self.sites)}
        if len(self._rank) != len(self.sites):
            raise GraphError(f"sites {self.sites} name a site twice")

    # --- building -----------------------------------------------------------------------------------------------

    def add_node(self, node: Node) -> None:
        """Add a node at a known site; a second node of the same id is refused."""
        if node.kind != "metric" and node.site not in self._rank:
            raise unknown("site", node.site, self.sites)
        if node.id in self.graph:
            raise GraphError(f"node {node.id!r} is already in the graph")
        self.graph.add_node(node.id, node=node)

    def add_edge(
        self,
        source: str,
        target: str,
        weight: float,
        *,
        interval: Sequence[float] | None = None,
        by_case: Mapping[str, float] | None = None,
    ) -> None:
        """Add an edge between two nodes of the graph, from a site to a later one or to the metric.

        Args:
            source: Id of the node it leaves.
            target: Id of the node it enters.
            weight: Its weight, in units of the metric.
            interval: Bounds of the weight, where they are known.
            by_case: The weight by case of prompts, where it is known.

        Raises:
            GraphError: For a node that is not there, an edge that leads back, or a number that is not finite.
        """
        for end in (source, target):
            if end not in self.graph:
                raise GraphError(f"edge {source} -> {target}: node {end!r} is not in the graph")
        if self.rank(source) >= self.rank(target):
            raise GraphError(f"edge {source} -> {target} does not go forward through the model")
        for value in (weight, *(interval or ()), *(by_case or {}).values()):
            if not math.isfinite(value):
                raise GraphError(f"weight of edge {source} -> {target} is {value}: it must be a finite number")
        bounds = {} if interval is None else {"interval": (float(interval[0]), float(interval[1]))}
        cases = {"by_case": {name: float(value) for name, value in by_case.items()}} if by_case else {}
        self.graph.add_edge(source, target, weight=float(weight), **bounds, **cases)

    # --- reading ------------------------------------------------------------------------------------------------

    def __contains__(self, id: str) -> bool:
        return id in self.graph

    def __len__(self) -> int:
        return len(self.graph)

    def __repr__(self) -> str:
        return f"FeatureGraph({len(self)} nodes, {self.graph.number_of_edges()} edges, {len(self.sites)} sites)"

    def node(self, id: str) -> Node:
        """The node of this id."""
        if id not in self.graph:
            raise unknown("node", id, self.graph)
        return self.graph.nodes[id]["node"]

    def nodes(self) -> list[Node]:
        """All nodes, in the order they were added."""
        return [node for _, node in self.graph.nodes(data="node")]

    def edges(self) -> list[Edge]:
        """All edges, in the order of their sources."""
        return [Edge(source, target, **values) for source, target, values in self.graph.edges(data=True)]

    def rank(self, id: str) -> int:
        """Place of the node's site in the forward order; the metric comes after every site."""
        node = self.node(id)
        return len(self.sites) if node.kind == "metric" else self._rank[node.site]

    @property
    def positions(self) -> list[int | str]:
        """The positions that occur: token positions in order, then spans as `metadata["positions"]` orders them."""
        occurring = {node.position: None for node in self.nodes() if node.position is not None}
        given = list(self.metadata.get("positions", ()))
        order = {name: number for number, name in enumerate([*given, *(p for p in occurring if p not in given)])}
        return sorted(occurring, key=lambda p: (0, p, "") if isinstance(p, int) else (1, order[p], p))

    @property
    def supernodes(self) -> dict[str, list[str]]:
        """Named groups of nodes, from `metadata["supernodes"]`: name -> ids of its nodes that are in the graph.

        A node is in the first group that names it, the metric in none; groups without a node here are left out.
        """
        taken: set[str] = {METRIC}
        groups: dict[str, list[str]] = {}
        for group in self.metadata.get("supernodes", ()):
            members = [id for id in dict.fromkeys(group["nodes"]) if id in self.graph and id not in taken]
            taken.update(members)
            if members:
                groups.setdefault(group["name"], []).extend(members)
        return groups

    def nodes_frame(self) -> pd.DataFrame:
        """One row a node: id, site, feature, kind, position, effect, label, and every attribute that is one value or an
        interval.
        """
        import pandas as pd

        rows = []
        for node in self.nodes():
            row = {key: getattr(node, key) for key in NODE_KEYS if key != "attributes"}
            plain = {key: value for key, value in node.attributes.items() if isinstance(value, int | float | str)}
            rows.append({**row, **plain, **_bounds(node.attributes.get("interval"))})
        return pd.DataFrame(rows).astype({"feature": "Int64"}) if rows else pd.DataFrame(columns=NODE_KEYS[:-1])

    def edges_frame(self) -> pd.DataFrame:
        """One row an edge: source, target, weight, and, where they are known, the bounds `low` and `high` and the
        weight on the prompts of each case, `weight (case)`.
        """
        import pandas as pd

        rows = [
            {
                **edge._asdict(),
                **_bounds(edge.interval),
                **{f"weight ({c})": w for c, w in (edge.by_case or {}).items()},
            }
            for edge in self.edges()
        ]
        more = dict.fromkeys(key for row in rows for key in row if key not in Edge._fields)
        return pd.DataFrame(rows, columns=["source", "target", "weight", *more])

    def _repr_html_(self) -> str:
        """A drawing of the strongest nodes, for notebooks."""
        import graphs  # the front door: what draws a graph is built on this module

        return graphs.to_svg(self, nodes=40, edges=150)

    # --- new graphs from this one -------------------------------------------------------------------------------

    def subgraph(self, ids: Iterable[str], *, edges: Iterable[tuple[str, str]] | None = None) -> FeatureGraph:
        """Give the graph on some of its nodes; metadata is shared.

        Args:
            ids: The nodes.
            edges: (source, target) of the edges that stay; all between the nodes by default.

        Returns:
            The graph.
        """
        keep = set(ids)
        allowed = None if edges is None else set(edges)
        smaller = FeatureGraph(self.sites, metadata=self.metadata)
        for node in self.nodes():
            if node.id in keep:
                smaller.add_node(node)
        for source, target, values in self.graph.edges(data=True):
            if source in keep and target in keep and (allowed is None or (source, target) in allowed):
                smaller.graph.add_edge(source, target, **values)
        return smaller

    def map_nodes(self, change: Callable[[Node], Node]) -> FeatureGraph:
        """The same graph with every node replaced by `change(node)`, which must keep its id."""
        changed = self.subgraph(self.graph)
        for node in self.nodes():
            new = change(node)
            if new.id != node.id:
                raise GraphError(f"node {node.id!r} cannot become {new.id!r}")
            changed.graph.nodes[node.id]["node"] = new
        return changed

    def with_labels(self, labels: Mapping[str, str]) -> FeatureGraph:
        """The same graph with the labels of `{"resid_3/120": "plural nouns"}`, by id or by name without position."""
        return self.map_nodes(lambda node: replace(node, label=labels.get(node.id, labels.get(node.name, node.label))))

    # --- files --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A plain dictionary that `from_json` turns back into the same graph."""
        return {
            "schema_version": SCHEMA_VERSION,
            "metadata": self.metadata,
            "sites": self.sites,
            "nodes": [{key: getattr(node, key) for key in NODE_KEYS} for node in self.nodes()],
            "edges": [edge.to_json() for edge in self.edges()],
        }

    @staticmethod
    def from_json(data: Any, *, source: str | Path = "graph") -> FeatureGraph:
        """Build the graph from `to_json`'s dictionary; `source` names the file in error messages."""
        check_type(data, GraphFile, source)
        return FeatureGraph._from_file(data, source)

    @staticmethod
    def _from_file(data: Any, source: str | Path) -> FeatureGraph:
        """The graph of `to_json`'s dictionary, whose types are checked."""
        try:
            graph = FeatureGraph(data["sites"], metadata=data["metadata"])
            for item in data["nodes"]:
                graph.add_node(Node(**{key: item[key] for key in NODE_KEYS}))
            for item in data["edges"]:
                given = {key: item.get(key) for key in ("interval", "by_case")}
                graph.add_edge(item["source"], item["target"], item["weight"], **given)
        except GraphError as error:
            raise GraphError(f"{source}: {error}") from None
        return graph

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the graph as JSON in one step.

        Args:
            path: The file.
            overwrite: Whether any other file is replaced.

        Raises:
            GraphError: For another file there, unless `overwrite`.
        """
        check_output(path, is_graph, overwrite=overwrite)
        write_json(path, self.to_json())

    @staticmethod
    def load(path: str | Path) -> FeatureGraph:
        """Read a graph written by `save`; anything wrong in the file raises GraphError with the file and the value."""
        return FeatureGraph._from_file(read_json(path, GraphFile), path)
