"""A circuit as it is kept: all node effects, the edges of its strongest nodes, and what it was made with.

A `Circuit` holds more than is drawn: effects of every node, so that another threshold never runs the model again,
and the edges among the `edge_nodes`. `Circuit.graph` cuts a `FeatureGraph` out of it. On disk it is a folder:

    circuit/circuit.json          the graph as pruned by default, with metadata: options, model, totals, sum check
    circuit/effects.safetensors   per site example, position, feature, value; edge nodes; edge weights
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits._circuit_files import FeaturesFile, absolute_in_run, check_metadata, read_effects, relative_to_run
from circuits._tensors import NOT_SAVED, flatten, unflatten
from circuits.attribution.activations import Setting
from circuits.attribution.edges import Edges
from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import Nodes, ranked, select_nodes
from circuits.circuit_source import CircuitSource, check_widths
from circuits.circuit_views import CircuitViews
from circuits.labels import Label, LabelsFile, group_members, groups_by_name, read_supernodes
from circuits.metrics.metrics import Metric, circuit_metric
from circuits.prompts.dataset import PromptSet
from graphs._outputs import is_graph
from graphs.drawing.style import describe
from graphs.feature_graph import FeatureGraph
from graphs.schema import SupernodeFile
from sae._files import TensorSpec, check_tensors, digest_tensors, read_header, read_json, write_tensors
from sae._run.outputs import check_output, has_header
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.features.options import FeaturePageOptions
from sae.features.page import FeaturePages
from sae.features.pages import feature_pages
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import SAEs

GRAPH_FILE = "circuit.json"
EFFECTS_FILE = "effects.safetensors"
FEATURES_FILE = "features.json"
PARTIAL_FOLDER = "partial"
"""Where the finished batches of a discovery are, until it ends."""


@dataclass(frozen=True)
class Circuit(CircuitViews):
    """Effects, edges and provenance of one discovery."""

    effects: dict[Site, SiteEffects]
    """Per-example effects of every node of every site, in forward order."""
    edge_nodes: Nodes
    """The nodes between which edges were computed."""
    edges: Edges
    """(upstream, downstream or None for the metric) -> mean weight over examples, [D, U] over `edge_nodes`."""
    metadata: dict[str, Any] = field(metadata=NOT_SAVED)
    """Plain JSON: `options`, `model`, `saes`, `prompts`, `n_examples`, `n_positions`, `total_effect`,
    `completeness` (the sum check), `positions` (names of the spans, where aggregated by spans), ...
    """
    intervals: dict[Site, Tensor] = field(default_factory=dict)
    """Bootstrap interval of every node of `nodes`, [n, 2] in their order; empty where not computed."""
    edge_intervals: Edges = field(default_factory=dict)
    """Bootstrap interval of every edge weight, [D, U, 2] like `edges`; empty where not computed."""
    edge_cases: Edges = field(default_factory=dict)
    """Mean weight over the examples of each case, [D, U, C] in the order of `metadata["cases"]`; empty where prompts
    have no cases, or discovery did not keep the weights of single examples.
    """
    edge_samples: Edges = field(default_factory=dict, metadata=NOT_SAVED)
    """Edge weights of every example, [N, D, U], as far as discovery kept them; not saved."""
    groups: Tensor | None = None
    """[B] the number of the template each example is drawn with for intervals; None for each by itself."""
    features: dict[str, Any] = field(default_factory=dict, repr=False, metadata=NOT_SAVED)
    """A description of each feature (`resid_3/120`), such as its top tokens; drawings are labelled by it."""
    labels: dict[str, Label] = field(default_factory=dict, repr=False, metadata=NOT_SAVED)
    """What people and programs call its features, as `labels.jsonl` beside the SAEs has it."""
    supernodes: list[SupernodeFile] = field(default_factory=list, repr=False, metadata=NOT_SAVED)
    """Named groups of its nodes, as `supernodes.json` has them (`circuits.labels`)."""
    source: CircuitSource = field(default_factory=CircuitSource, repr=False, compare=False, metadata=NOT_SAVED)
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
        self, path: str | Path | None = None, *, limit: int | None = None, need_spans: bool | None = None
    ) -> PromptSet:
        """Read a file of prompts as the circuit's own were read.

        Args:
            path: A file of prompts; the one that it was found on by default.
            limit: How many prompts are read at most.
            need_spans: Whether prompts without spans are refused; by default they are where the circuit is by span.

        Returns:
            The prompts.

        Raises:
            UserError: For a file without prompts, or where the file of the circuit's own prompts has changed.
        """
        return self.source.read_prompts(self.metadata, path, limit=limit, need_spans=need_spans)

    def get_metric(self, given: str | Metric | None = None) -> Metric:
        """The metric it explains. Of a circuit from a file whose metric is Python code, it has to be given again.

        Raises UserError where it is not given, or where another one is given.
        """
        return self.metric if given is None else circuit_metric(self.metadata, given=given)

    def setting(self, metric: str | Metric | None = None) -> Setting:
        """Its model, SAEs and metric, which fit each other, for whatever runs them; `metric` as in `get_metric`."""
        m = self.get_metric(metric)  # first: it may be refused before anything is loaded
        return Setting.of(self.model, self.saes, m, sites=self.effects)

    def strongest_features(self, n: int) -> FeatureNames:
        """The n features of largest |effect|, errors left out.

        Args:
            n: how many.

        Returns:
            Their names, each with its position or span where the circuit keeps these apart (`resid_3/120@subject`),
            together with the circuit, so that `ablate` and `steer` need nothing else.
        """
        features = {site: nodes[nodes.is_feature] for site, nodes in self.nodes.items()}
        return FeatureNames([name for name, _ in ranked(select_nodes(features, top=n))], self)

    def supernode(self, name: str) -> FeatureNames:
        """The features of a supernode.

        Args:
            name: its name, as it is or as `plural-subject` for "Plural subject".

        Returns:
            Their names together with the circuit, so that `ablate` and `steer` need nothing else.

        Raises:
            UserError: there is no such supernode.
        """
        return FeatureNames(group_members(name, groups_by_name(self.supernodes)), self, is_group=True)

    def feature_pages(
        self, texts: str | Path | Iterable[str], options: FeaturePageOptions | None = None
    ) -> FeaturePages:
        """The pages of its features that have edges: when they are on, in which contexts, and what they do there.

        Args:
            texts: documents, a .txt or .jsonl file, or a hub data set.
            options: how much is read and shown.

        Returns:
            The pages by name, `resid_3/120`; see `sae.feature_pages`.

        Raises:
            UserError: the text is empty, or the circuit has no features.
        """
        return feature_pages(self.model, self.saes, texts, self.features_with_edges(), options)

    def features_with_edges(self) -> dict[Site, list[int]]:
        """Indices of its features by site: those with edges, or the 100 strongest where edges were not computed."""
        chosen = self.edge_nodes or self.strongest(100)
        indices = {site: nodes.feature[nodes.is_feature].unique().tolist() for site, nodes in sorted(chosen.items())}
        return {site: index for site, index in indices.items() if index}

    @property
    def feature_effects(self) -> dict[str, float]:
        """Effect of every feature, in units of the metric, by its name with its position or span."""
        features = {site: nodes[nodes.is_feature] for site, nodes in self.nodes.items()}
        return {
            name: effect
            for site, nodes in features.items()
            for name, effect in zip(nodes.ids(site), nodes.effect.tolist(), strict=True)
        }

    def _names(self, names: list[str]) -> FeatureNames:
        return FeatureNames(names, self)

    # --- files --------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, graph: FeatureGraph | None = None, overwrite: bool = False) -> Path:
        """Write `effects.safetensors`, then `circuit.json`, each in one step.

        Both say which circuit they are of (`digest`), so that a new one is never read with half of an old one.

        Args:
            folder: the `circuit` folder of a run.
            graph: the graph as pruned by default; the 100 strongest nodes with 1,000 edges where none is given.
            overwrite: whether files of these names are replaced that are no circuit.

        Returns:
            The folder.

        Raises:
            UserError: for a file of another program, unless `overwrite`, or a link.
        """
        folder = Path(folder)
        check_output(folder / GRAPH_FILE, is_graph, overwrite=overwrite)
        check_output(folder / EFFECTS_FILE, has_header("circuit"), overwrite=overwrite)
        graph = graph if graph is not None else self._shown(100, 1000)
        tensors = {name: x.clone() for name, x in flatten(self).items()}
        self.metadata["digest"] = self._digest(tensors, folder.parent)
        write_tensors(folder / EFFECTS_FILE, tensors, metadata={"circuit": self.metadata["digest"]})
        portable = graph.subgraph(graph.graph)
        metadata = {key: value for key, value in graph.metadata.items() if key != "supernodes"}  # of another file
        portable.metadata = relative_to_run({**metadata, "digest": self.metadata["digest"]}, folder.parent)
        portable.save(folder / GRAPH_FILE, overwrite=True)
        return folder

    def _digest(self, tensors: Mapping[str, Tensor], run: Path) -> str:
        """A short hash of all tensors and of the metadata, the same wherever the run folder stands."""
        made_with = relative_to_run({key: value for key, value in self.metadata.items() if key != "digest"}, run)
        text = json.dumps(made_with, sort_keys=True, default=str) + digest_tensors(tensors)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

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
            options: device, dtype, device_map, quantize, remote, site_paths, sae_memory and stream of `CircuitSource`.

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
        tensors = read_effects(folder / EFFECTS_FILE, metadata)
        spans = tuple(metadata.get("positions", ()))
        features = folder / FEATURES_FILE
        described = read_json(features, FeaturesFile)["features"] if features.is_file() else {}
        circuit = unflatten(
            Circuit, tensors, metadata=metadata, source=source, features=described, spans=spans, n_features=0,
            labels=LabelsFile.of(metadata, folder.parent).read(),
            supernodes=read_supernodes(folder, metadata.get("digest")),
        )  # fmt: skip
        for site, nodes in circuit.edge_nodes.items():
            circuit.edge_nodes[site] = replace(nodes, n_features=circuit.effects[site].n_features)
        intervals = circuit.intervals
        expected = {
            f"intervals/{site.name}": TensorSpec((len(circuit.nodes[site]), 2), finite=False) for site in intervals
        }
        expected["groups"] = TensorSpec((metadata["n_examples"],), "int", optional=True)
        check_tensors(tensors, expected, folder / EFFECTS_FILE)
        return circuit


class FeatureNames(list[str]):
    """Names of features (`resid_3/120`), strongest first, with the circuit they are of."""

    def __init__(self, names: Iterable[str], circuit: Circuit, *, is_group: bool = False) -> None:
        super().__init__(names)
        self.circuit = circuit
        self.is_group = is_group

    def _repr_html_(self) -> str:
        """A sentence on each of the features, for notebooks."""
        table = self.circuit.nodes_frame()
        graph = self.circuit._shown(len(table), 0)
        words = {node.id: describe(graph, node) for node in graph.nodes()}
        table = table[table["node"].isin(self)].assign(words=lambda rows: rows["node"].map(words).fillna(""))
        return table[["node", "words", "effect"]].to_html(index=False, border=0, float_format="{:+.3g}".format)


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
