"""A circuit as a graph, a picture, a table and text; `Circuit` has all of this.

A graph is cut out of the effects and edges that a circuit holds, so that another threshold never runs the model again.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from circuits._tensors import METRIC
from circuits.attribution.edges import Edges
from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import Nodes, aggregate, count, distinguishable, select_nodes
from circuits.labels import Label, labelled
from graphs._outputs import has_mark
from graphs.classes import find_classes
from graphs.drawing.dot import draw, to_svg
from graphs.drawing.style import describe
from graphs.explorer import explore, explorer_widget
from graphs.feature_graph import FeatureGraph, Position, error_node, feature_node, metric_node, skip_node
from graphs.pruning import by_edge_threshold, by_top_edges
from graphs.schema import SupernodeFile
from graphs.supernodes import SIMILARITY, find_supernodes
from sae._run.outputs import check_output
from sae.errors import UserError
from sae.model.sites import Site

if TYPE_CHECKING:
    from anywidget import AnyWidget


class CircuitViews:
    """Ways to see a circuit, whose fields `circuits.circuit.Circuit` documents."""

    effects: dict[Site, SiteEffects]
    edge_nodes: Nodes
    edges: Edges
    metadata: dict[str, Any]
    intervals: dict[Site, Tensor]
    edge_intervals: Edges
    edge_cases: Edges
    features: dict[str, Any]
    labels: dict[str, Label]
    supernodes: list[SupernodeFile]

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of the spans that nodes live in, where aggregated by spans."""
        return tuple(self.metadata.get("positions", ()))

    @cached_property
    def nodes(self) -> Nodes:
        """Aggregated effects of all nodes, strongest first in each site."""
        return aggregate(
            self.effects,
            n_examples=self.metadata["n_examples"],
            n_positions=self.metadata["n_positions"],
            aggregation=self.metadata["options"]["aggregation"],
            spans=self.spans,
        )

    def strongest(self, n: int) -> Nodes:
        """The n nodes of largest |effect| over all sites."""
        return select_nodes(self.nodes, top=n)

    def graph(
        self,
        *,
        nodes: int | None = None,
        node_threshold: float | None = None,
        edges: int | None = None,
        edge_threshold: float | None = None,
        significant: bool = False,
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> FeatureGraph:
        """The feature graph of the strongest nodes and the edges between them.

        nodes, node_threshold, edges, edge_threshold: as in `select_nodes`, None for no limit; significant: of these
        nodes and edges, only those whose interval leaves out zero; attributes: by node name without position
        (`resid_3/120`), stored with the node. Raises `UserError` if a node has no edges computed.
        """
        shown = select_nodes(self.nodes, top=nodes, threshold=node_threshold)
        if significant:
            shown = self._distinguishable(shown)
        metadata = {**self.metadata, **({"supernodes": self.supernodes} if self.supernodes else {})}
        graph = FeatureGraph([site.name for site in self.effects], metadata=metadata)
        self._add_nodes(graph, shown, attributes or {})
        graph.add_node(metric_node(effect=self.metadata["total_effect"] or 0.0))
        self._add_edges(graph, significant=significant)
        graph = labelled(graph, self.labels)
        if edge_threshold is not None:
            graph = by_edge_threshold(graph, edge_threshold)
        return graph if edges is None else by_top_edges(graph, edges)

    def find_supernodes(self, *, nodes: int = 100, similarity: float = SIMILARITY) -> dict[str, list[str]]:
        """Group features that read and feed the same nodes.

        Args:
            nodes: how many of the strongest nodes take part, with all edges between them.
            similarity: the least cosine of the edges of two members, in (0, 1]; see `graphs.supernodes`.

        Returns:
            Name -> ids of the nodes; nodes of groups that a person made are left out.
        """
        by_hand = [id for group in self.supernodes if not group.get("automatic") for id in group["nodes"]]
        n_with_edges = count(self.edge_nodes)
        graph = self.graph(nodes=min(nodes, n_with_edges or nodes), attributes=self.features)
        return find_supernodes(graph, similarity=similarity, apart=by_hand)

    def _add_nodes(self, graph: FeatureGraph, shown: Nodes, attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the nodes with what is known of them: attributes, results of verification, intervals."""
        bounds = self._bounds(shown)
        verified = self.metadata.get("verification", {}).get("nodes", {})
        for site, nodes in shown.items():
            rows = zip(nodes.feature.tolist(), nodes.position.tolist(), nodes.effect.tolist(), strict=True)
            for name, (feature, position, effect) in zip(nodes.ids(site), rows, strict=True):
                where: Position = None if position < 0 else nodes.spans[position] if nodes.spans else position
                measured = {**verified.get(name, {}), **bounds.get(name, {})}
                if feature >= nodes.n_features:
                    other = error_node if feature == nodes.n_features else skip_node
                    graph.add_node(other(site.name, effect=effect, position=where, **measured))
                else:
                    measured = {**attributes.get(f"{site.name}/{feature}", {}), **measured}
                    graph.add_node(feature_node(site.name, feature, effect=effect, position=where, **measured))

    def _distinguishable(self, shown: Nodes) -> Nodes:
        """The strongest nodes whose interval leaves out zero; a site's strongest stand in front."""
        if not self.intervals:
            reason = self.metadata.get("uncertainty", {}).get("too_few")
            why = f": {reason}" if reason else ": discover again with resamples above 0"
            raise UserError(f"this circuit has no intervals{why}")
        return distinguishable(shown, {site: self.intervals[site][: len(nodes)] for site, nodes in shown.items()})

    def _bounds(self, shown: Nodes) -> dict[str, dict[str, list[float]]]:
        """Node name -> {"interval": [low, high]} for the nodes, where there are intervals (not NaN)."""
        names = {name for site, nodes in shown.items() for name in nodes.ids(site)}
        return {
            name: {"interval": interval}
            for site, intervals in self.intervals.items()
            for name, interval in zip(self.nodes[site].ids(site), intervals.tolist(), strict=True)
            if name in names and interval[0] == interval[0]
        }

    def _add_edges(self, graph: FeatureGraph, *, significant: bool) -> None:
        """Add the edges between nodes of the graph."""
        names = {site: site_nodes.ids(site) for site, site_nodes in self.edge_nodes.items()}
        with_edges = {name for site_names in names.values() for name in site_names}
        without = [node.id for node in graph.nodes() if node.kind != "metric" and node.id not in with_edges]
        if without and self.edges:
            raise UserError(
                f"edges were computed among the {len(with_edges)} strongest nodes and {without[0]!r} is not one of "
                "them: keep fewer nodes, or discover again with more edge nodes"
            )
        cases = list(self.metadata.get("cases", ()))
        for (up, down), weights in self.edges.items():
            targets = ["metric"] if down is None else names[down]
            bounds, of_cases = self.edge_intervals.get((up, down)), self.edge_cases.get((up, down))
            is_shown = weights != 0 if bounds is None or not significant else bounds.prod(-1) > 0
            for row, column in is_shown.nonzero().tolist():
                if names[up][column] in graph and targets[row] in graph:
                    interval = None if bounds is None else tuple(bounds[row, column].tolist())
                    interval = interval if interval and interval[0] == interval[0] else None  # too few to tell
                    by_case = {} if of_cases is None else dict(zip(cases, of_cases[row, column].tolist(), strict=True))
                    graph.add_edge(
                        names[up][column], targets[row], float(weights[row, column]),
                        interval=interval, by_case=by_case,
                    )  # fmt: skip

    # --- pictures, tables and text -------------------------------------------------------------------------------

    def plot(
        self, path: str | Path, *, nodes: int = 40, edges: int = 150, title: str | None = None, overwrite: bool = False,
        **options: Any,
    ) -> Path:  # fmt: skip
        """Draw the strongest nodes and edges.

        Args:
            path: the file to write: .svg, .png, .pdf or .dot.
            nodes, edges: how many are drawn at most.
            title: heading; that of the circuit by default.
            overwrite: whether a file is replaced that this program did not write.
            options: as in `graph`, such as `significant=True`.

        Returns:
            The path.

        Raises:
            UserError: for a file of another program, unless `overwrite`, or a link.
        """
        check_output(path, has_mark(Path(path).suffix), overwrite=overwrite)
        return draw(self._shown(nodes, edges, **options), path, title=title, overwrite=overwrite)

    def explore(
        self, path: str | Path | None = None, *, nodes: int = 300, edges: int = 3000, title: str | None = None,
        overwrite: bool = False, **options: Any,
    ) -> Path | AnyWidget:  # fmt: skip
        """Write one interactive page that needs no server; arguments as in `plot`.

        Without a path, the same as a widget in a notebook: its `selected` are names of what was clicked, together with
        the circuit, so that `ablate(widget.selected, prompts)` needs nothing else; `labels` and `groups` are what was
        named there. Setting them changes the page.
        """
        if path is None:
            return explorer_widget(self._shown(nodes, edges, **options), title=title, names=self._names)
        check_output(path, has_mark(".html"), overwrite=overwrite)
        return explore(self._shown(nodes, edges, **options), path, title=title, overwrite=overwrite)

    def _names(self, names: list[str]) -> list[str]:
        """Names of nodes, in the form that edits take them in."""
        return names

    def _shown(self, nodes: int, edges: int, **options: Any) -> FeatureGraph:
        """The graph of at most `nodes` nodes that have edges, labelled where it is known what their features do."""
        n_with_edges = count(self.edge_nodes)
        return self.graph(
            nodes=min(nodes, n_with_edges or nodes), edges=edges, **{"attributes": self.features, **options}
        )

    def nodes_frame(self) -> pd.DataFrame:
        """All nodes with an effect, strongest first, one row each.

        Returns:
            Columns node, site, feature (None for an error or a skip connection), position (None where positions are
            summed), effect in units of the metric, and the bounds low and high of its interval where there is one.
        """
        tables = []
        for site, nodes in self.nodes.items():
            rows = {
                "node": nodes.ids(site),
                "site": site.name,
                "feature": pd.array(nodes.feature.numpy(), dtype="Int64"),
                "position": [nodes.spans[p] if nodes.spans else p for p in nodes.position.tolist()],
                "effect": nodes.effect.numpy(),
            }
            table = pd.DataFrame(rows)
            table.loc[~nodes.is_feature.numpy(), "feature"] = pd.NA
            if nodes.summed:
                table["position"] = None
            if site in self.intervals:
                table[["low", "high"]] = self.intervals[site].numpy()
            tables.append(table)
        table = pd.concat(tables, ignore_index=True)
        return table.sort_values("effect", key=abs, ascending=False, kind="stable", ignore_index=True)

    to_frame = nodes_frame

    def edges_frame(self) -> pd.DataFrame:
        """All edges with a weight, strongest first, one row each.

        Returns:
            Columns source, target (`metric` for the metric), weight in units of the metric, the bounds low and high of
            its interval where there is one, and `weight (case)`, its mean over the prompts of each case.
        """
        cases = [f"weight ({case})" for case in self.metadata.get("cases", ())] if self.edge_cases else []
        names = {site: nodes.ids(site) for site, nodes in self.edge_nodes.items()}
        rows: list[dict[str, Any]] = []
        for (up, down), weights in self.edges.items():
            bounds = self.edge_intervals.get((up, down))
            for target, source in weights.nonzero().tolist():
                row = {"source": names[up][source], "target": METRIC if down is None else names[down][target]}
                row["weight"] = weights[target, source].item()
                if bounds is not None:
                    row["low"], row["high"] = bounds[target, source].tolist()
                if (of_cases := self.edge_cases.get((up, down))) is not None:
                    row |= zip(cases, of_cases[target, source].tolist(), strict=True)
                rows.append(row)
        columns = ["source", "target", "weight", *(["low", "high"] if self.edge_intervals else []), *cases]
        table = pd.DataFrame(rows, columns=columns)
        return table.sort_values("weight", key=abs, ascending=False, kind="stable", ignore_index=True)

    def text(self) -> str:
        """A summary for the terminal: the metric, the sum check, the error nodes, and the strongest nodes."""
        meta, lines = self.metadata, []
        if meta.get("m_clean") is not None:
            patch = "" if meta.get("m_patch") is None else f", {meta['m_patch']:+.3f} on patch prompts"
            total = "" if meta["total_effect"] is None else f"; total effect {meta['total_effect']:+.3f}"
            lines.append(f"metric m: {meta['m_clean']:+.3f} on clean prompts{patch}{total}")
        if sums := meta.get("completeness"):
            lines.append(
                "sum check: the effects of a site add up to that of patching it within "
                f"{sums['mean_residual']:.2%} of the total on average, {sums['worst_residual']:.2%} at worst "
                f"({sums['worst_site']})"
            )
        for key, what in (("errors", "error nodes"), ("skips", "skip connections")):
            if shares := meta.get(key):
                lines.append(
                    f"through {what}: {shares['mean_share']:.0%} of the total effect on average over sites, "
                    f"{shares['largest_share']:.0%} at {shares['largest_site']}"
                )
        lines.append(f"{count(self.nodes)} nodes have an effect; the strongest:")
        return "\n".join([*lines, *self.strongest_lines(10)])

    def strongest_lines(self, n: int) -> list[str]:
        """The n strongest nodes, one line each: effect, class of prompts it is on for, and what its feature means."""
        graph = self._shown(max(n, 100), 0)
        nodes = sorted(graph.nodes(), key=lambda node: (node.kind == "metric", -abs(node.effect)))[:n]
        classes = find_classes(graph)
        sides = [classes.side(node.id) if classes else "" for node in nodes]
        wide, wide_side = max(18, *(len(node.id) for node in nodes)), max(map(len, sides))
        return [
            f"  {node.id:<{wide}} {node.effect:+.4f}  {side:<{wide_side}}  {describe(graph, node)}".rstrip()
            for node, side in zip(nodes, sides, strict=True)
        ]

    def _repr_html_(self) -> str:
        """The drawing, for notebooks."""
        return to_svg(self._shown(40, 150), nodes=40, edges=150)
