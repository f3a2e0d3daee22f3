"""A circuit as it is kept: all node effects, the edges of its strongest nodes, and what it was made with.

A `Circuit` holds more than is drawn: effects of every node, so that another threshold never runs the model again,
and the edges among the `edge_nodes`. `Circuit.graph` cuts a `FeatureGraph` out of it. On disk it is a folder:

    circuit/circuit.json          the graph as pruned by default, with metadata: options, model, totals, completeness
    circuit/effects.safetensors   per site example, position, feature, value; edge nodes; edge weights
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.attribution.edges import Edges
from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import Nodes, SiteNodes, aggregate, distinguishable, select_nodes
from circuits.circuit_files import ENTRIES, NODES, absolute_in_run, check_metadata, read_effects, relative_to_run
from circuits.circuit_source import CircuitSource, check_widths
from circuits.metrics.metrics import Metric, circuit_metric
from circuits.prompts.dataset import PromptSet
from graphs.feature_graph import FeatureGraph, Position, error_node, feature_node, metric_node
from graphs.pruning import by_edge_threshold, by_top_edges
from sae._files import TensorSpec, check_tensors, digest_tensors, read_header, write_tensors
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import SAEs

GRAPH_FILE = "circuit.json"
EFFECTS_FILE = "effects.safetensors"
PARTIAL_FOLDER = "partial"
"""Holds what of a discovery is finished, until it ends."""


@dataclass(frozen=True)
class Circuit:
    """Effects, edges and provenance of one discovery."""

    effects: dict[Site, SiteEffects]
    """Per-example effects of every node of every site, in forward order."""
    edge_nodes: Nodes
    """The nodes between which edges were computed."""
    edges: Edges
    """(upstream, downstream or None for the metric) -> mean weight over examples, [D, U] over `edge_nodes`."""
    metadata: dict[str, Any]
    """Plain JSON: `options`, `model`, `saes`, `prompts`, `n_examples`, `n_positions`, `total_effect`,
    `completeness`, `positions` (names of the spans, where aggregated by spans), ...
    """
    intervals: dict[Site, Tensor] = field(default_factory=dict)
    """Bootstrap interval of every node of `nodes`, [n, 2] in their order; empty where not computed."""
    edge_intervals: Edges = field(default_factory=dict)
    """Bootstrap interval of every edge weight, [D, U, 2] like `edges`; empty where not computed."""
    edge_samples: Edges = field(default_factory=dict)
    """Edge weights of every example, [N, D, U], as far as discovery kept them; not saved."""
    groups: Tensor | None = None
    """[B] the number of the template each example is drawn with for intervals; None for each by itself."""
    source: CircuitSource = field(default_factory=CircuitSource, repr=False, compare=False)
    """The model, SAEs, metric and prompts it was found with, or where they are loaded from."""

    @property
    def model(self) -> LanguageModel:
        """The model it was found in; of a circuit from disk, loaded the first time."""
        return self.source.get_model(self.metadata)

    @property
    def saes(self) -> SAEs:
        """The SAEs whose features are its nodes; of a circuit from disk, loaded the first time."""
        saes = self.source.get_saes(self.metadata)
        check_widths({site: effects.n_features for site, effects in self.effects.items()}, saes, self.source.path)
        return saes

    @property
    def metric(self) -> Metric:
        """The metric it explains. Raises UserError for a circuit from disk whose metric is Python code: give it to
        `Circuit.load`.
        """
        return self.source.get_metric(self.metadata)

    @property
    def prompts(self) -> PromptSet:
        """The prompts it was found on; of a circuit from disk, read and tokenised the first time."""
        return self.source.get_prompts(self.metadata)

    def read_prompts(
        self, path: str | Path | None = None, *, limit: int | None = None, need_spans: bool = False
    ) -> PromptSet:
        """At most `limit` prompts of a file, or of those it was found on; see `CircuitSource.read_prompts`."""
        return self.source.read_prompts(self.metadata, path, limit=limit, need_spans=need_spans)

    @property
    def spans(self) -> tuple[str, ...]:
        """Names of the spans that nodes live in, where aggregated by spans."""
        return tuple(self.metadata.get("positions", ()))

    def get_metric(self, given: str | Metric | None = None) -> Metric:
        """The metric it explains. Of a circuit from a file whose metric is Python code, it has to be given again.

        Raises UserError where it is not given, or where another one is given.
        """
        return self.metric if given is None else circuit_metric(self.metadata, given=given)

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

    def strongest_features(self, n: int) -> FeatureNames:
        """The n features of largest |effect|, errors left out.

        Args:
            n: how many.

        Returns:
            Their names, each with its position or span where the circuit keeps these apart (`resid_3/120@subject`),
            together with the circuit, so that `ablate` and `steer` need nothing else.
        """
        features = {site: nodes[~nodes.is_error] for site, nodes in self.nodes.items()}
        strongest = select_nodes(features, top=n)
        rows = [
            (-abs(effect), name)
            for site, nodes in strongest.items()
            for name, effect in zip(nodes.ids(site), nodes.effect.tolist(), strict=True)
        ]
        return FeatureNames([name for _, name in sorted(rows, key=lambda row: row[0])], self)

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
        (`resid_3/120`), stored with the node. Raises `UserError` if a kept node has no edges computed.
        """
        kept = select_nodes(self.nodes, top=nodes, threshold=node_threshold)
        if significant:
            kept = self._distinguishable(kept)
        bounds = self._bounds(kept)
        measured = self.metadata.get("verification", {}).get("nodes", {})
        graph = FeatureGraph([site.name for site in self.effects], metadata=self.metadata)
        for site, site_nodes in kept.items():
            rows = zip(
                site_nodes.feature.tolist(), site_nodes.position.tolist(), site_nodes.effect.tolist(), strict=True
            )
            for name, (feature, position, effect) in zip(site_nodes.ids(site), rows, strict=True):
                where: Position = None if position < 0 else site_nodes.spans[position] if site_nodes.spans else position
                known = {**measured.get(name, {}), **bounds.get(name, {})}
                if feature == site_nodes.n_features:
                    graph.add_node(error_node(site.name, effect=effect, position=where, **known))
                else:
                    known = {**(attributes or {}).get(f"{site.name}/{feature}", {}), **known}
                    graph.add_node(feature_node(site.name, feature, effect=effect, position=where, **known))
        graph.add_node(metric_node(effect=self.metadata["total_effect"] or 0.0))
        self._add_edges(graph, significant=significant)
        if edge_threshold is not None:
            graph = by_edge_threshold(graph, edge_threshold)
        return graph if edges is None else by_top_edges(graph, edges)

    def _distinguishable(self, kept: Nodes) -> Nodes:
        """Those of the strongest nodes whose interval leaves out zero; a site's strongest stand in front."""
        if not self.intervals:
            reason = self.metadata.get("uncertainty", {}).get("too_few")
            why = f": {reason}" if reason else ": discover again with resamples above 0"
            raise UserError(f"this circuit has no intervals{why}")
        return distinguishable(kept, {site: self.intervals[site][: len(nodes)] for site, nodes in kept.items()})

    def _bounds(self, kept: Nodes) -> dict[str, dict[str, list[float]]]:
        """Node name -> {"interval": [low, high]} for the kept nodes, where there are intervals (not NaN)."""
        wanted = {name for site, nodes in kept.items() for name in nodes.ids(site)}
        return {
            name: {"interval": interval}
            for site, intervals in self.intervals.items()
            for name, interval in zip(self.nodes[site].ids(site), intervals.tolist(), strict=True)
            if name in wanted and interval[0] == interval[0]
        }

    def _add_edges(self, graph: FeatureGraph, *, significant: bool) -> None:
        names = {site: site_nodes.ids(site) for site, site_nodes in self.edge_nodes.items()}
        known = {name for site_names in names.values() for name in site_names}
        without = [node.id for node in graph.nodes() if node.kind != "metric" and node.id not in known]
        if without and self.edges:
            raise UserError(
                f"edges were computed among the {len(known)} strongest nodes and {without[0]!r} is not one of them: "
                "keep fewer nodes, or discover again with more edge nodes"
            )
        for (up, down), weights in self.edges.items():
            targets = ["metric"] if down is None else names[down]
            bounds = self.edge_intervals.get((up, down))
            wanted = weights != 0 if bounds is None or not significant else bounds.prod(-1) > 0
            for row, column in wanted.nonzero().tolist():
                if names[up][column] in graph and targets[row] in graph:
                    interval = None if bounds is None else tuple(bounds[row, column].tolist())
                    interval = interval if interval and interval[0] == interval[0] else None  # too few to tell
                    graph.add_edge(names[up][column], targets[row], float(weights[row, column]), interval=interval)

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, graph: FeatureGraph) -> Path:
        """Write `effects.safetensors`, then `circuit.json` (the pruned `graph`), each in one step.

        Both say which circuit they are of (`digest`), so that a new one is never read with half of an old one.
        """
        folder, tensors = Path(folder), self._tensors()
        self.metadata["digest"] = self._digest(tensors)
        write_tensors(folder / EFFECTS_FILE, tensors, metadata={"circuit": self.metadata["digest"]})
        portable = graph.subgraph(graph.graph)
        portable.metadata = relative_to_run({**graph.metadata, "digest": self.metadata["digest"]}, folder.parent)
        portable.save(folder / GRAPH_FILE)
        return folder

    def _digest(self, tensors: Mapping[str, Tensor]) -> str:
        """A short hash of everything that was found and what it was made with."""
        made_with = {key: value for key, value in self.metadata.items() if key != "digest"}
        text = json.dumps(made_with, sort_keys=True, default=str) + digest_tensors(tensors)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _tensors(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for site, effects in self.effects.items():
            for name in ENTRIES:
                tensors[f"effects/{site.name}/{name}"] = getattr(effects, name)
            tensors[f"effects/{site.name}/n_features"] = torch.tensor([effects.n_features])
        for site, nodes in self.edge_nodes.items():
            for name in NODES:
                tensors[f"edge_nodes/{site.name}/{name}"] = getattr(nodes, name)
        if self.groups is not None:
            tensors["groups"] = self.groups
        for site, interval in self.intervals.items():
            tensors[f"intervals/{site.name}"] = interval
        for kind, values in (("edges", self.edges), ("edge_intervals", self.edge_intervals)):
            for (up, down), weights in values.items():
                tensors[f"{kind}/{up.name}/{'metric' if down is None else down.name}"] = weights
        return {name: tensor.clone() for name, tensor in tensors.items()}

    @staticmethod
    def load(
        path: str | Path,
        *,
        model: LanguageModel | str | None = None,
        saes: Mapping[Site, SparseAutoencoder] | str | Path | None = None,
        metric: str | Metric | None = None,
        **options: Any,
    ) -> Circuit:
        """Read a circuit from disk. Its model and SAEs are loaded when they are first asked for.

        Args:
            path: a run folder, or the `circuit` folder inside it.
            model: the model or its name, in place of the one the circuit names.
            saes: the SAEs or their folder, in place of those the circuit names.
            metric: the metric, where it is Python code: none runs because a file names it.
            options: device, dtype, site_paths, sae_memory and stream of `CircuitSource`.

        Raises:
            UserError, GraphError: for a folder without a circuit, or a damaged one.
        """
        folder = circuit_folder(path)
        source = CircuitSource(model=model, saes=saes, metric=metric, path=path, **options)
        metadata = FeatureGraph.load(folder / GRAPH_FILE).metadata
        if (noted := read_header(folder / EFFECTS_FILE).get("circuit")) and noted != metadata.get("digest"):
            raise UserError(
                f"{GRAPH_FILE} and {EFFECTS_FILE} in {str(folder)!r} are of two circuits: discover with --overwrite"
            )
        check_metadata(metadata, folder / GRAPH_FILE, circuit=True)
        metadata = absolute_in_run(metadata, folder.parent)
        effects, tensors, with_edges = read_effects(folder / EFFECTS_FILE, metadata)
        spans = tuple(metadata.get("positions", ()))
        nodes: Nodes = {}
        for site in with_edges:
            feature, position, effect = (tensors[f"edge_nodes/{site.name}/{name}"] for name in NODES)
            n_features = effects[site].n_features
            nodes[site] = SiteNodes(n_features, feature.long(), position.long(), effect.float(), spans)
        edges: dict[str, Edges] = {"edges": {}, "edge_intervals": {}}
        for name, weights in tensors.items():
            kind, *between = name.split("/")
            if kind in edges:
                pair = Site.parse(between[0]), None if between[1] == "metric" else Site.parse(between[1])
                edges[kind][pair] = weights.float()
        intervals = {site: tensors[f"intervals/{site.name}"] for site in effects if f"intervals/{site.name}" in tensors}
        circuit = Circuit(effects, nodes, edges["edges"], metadata, intervals, edges["edge_intervals"], source=source)
        expected = {
            f"intervals/{site.name}": TensorSpec((len(circuit.nodes[site]), 2), finite=False) for site in intervals
        }
        expected["groups"] = TensorSpec((metadata["n_examples"],), "int", optional=True)
        check_tensors(tensors, expected, folder / EFFECTS_FILE)
        return replace(circuit, groups=tensors["groups"].long() if "groups" in tensors else None)


class FeatureNames(list[str]):
    """Names of features (`resid_3/120`), strongest first, with the circuit they are of."""

    def __init__(self, names: Iterable[str], circuit: Circuit) -> None:
        super().__init__(names)
        self.circuit = circuit


def circuit_digest(folder: Path) -> str | None:
    """Which circuit is in a folder; None for one of an earlier version."""
    return read_header(folder / EFFECTS_FILE).get("circuit")


def circuit_folder(path: str | Path) -> Path:
    """The folder with `circuit.json` and `effects.safetensors`: the path itself or `circuit` inside it."""
    for folder in (Path(path), Path(path) / "circuit"):
        if (folder / GRAPH_FILE).is_file() and (folder / EFFECTS_FILE).is_file():
            return folder
    for folder in (Path(path), Path(path) / "circuit"):
        if (folder / PARTIAL_FOLDER).is_dir():
            raise UserError(
                f"the discovery in {str(folder)!r} has not ended (it was interrupted, or still runs): go on with sfc "
                "discover --resume and the same options, or start again with --overwrite"
            )
    raise UserError(
        f"no circuit in {str(path)!r}: looked for {GRAPH_FILE} and {EFFECTS_FILE} there and in circuit/; "
        "make one with sfc discover"
    )
