"""`sfc discover`: find the circuit behind a set of prompts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.cli.options import HasModel, HasSaes, Output, Overwrites, SharesWork, UsesSaes
from circuits.options import DiscoverOptions
from sae._files import prepare_folder, read_json, write_json
from sae._options import Count, Magnitude, Positive, Resamples
from sae._run.contents import CIRCUIT, MEASURED, check_contents, check_run_config, remove, visible
from sae._run.locks import lock
from sae._run.outputs import check_no_link
from sae._run.processes import current
from sae.data.text import TextSource
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.prompts.dataset import PromptSet
    from graphs.feature_graph import FeatureGraph


NODES = 100
"""Nodes of a graph by default."""


@dataclass(frozen=True, kw_only=True)
class DiscoverCommand(UsesSaes, Overwrites, SharesWork, HasSaes, HasModel):
    """Find the circuit behind a set of prompts: effects of all features and errors, edges among the strongest."""

    prompts: str
    """Prompts: JSON lines with clean_prefix, patch_prefix, clean_answer, patch_answer; or EAP-IG's CSV, AutoCircuit's
    JSON, a hub data set.
    """
    out: Path
    """Run folder that receives circuit/."""
    examples: Positive = 100
    """Prompts used: the first of the file, or some of each case and template where these miss one."""
    span_template: str | None = None
    """Template that finds the token spans of all prompts, such as "The {subject} near the {attractor}"; otherwise the
    prompts' own "spans" or templates do.
    """
    nodes: Positive | None = None
    """Nodes kept in circuit.json, the strongest: 100 by default, or as many as have edges (--edge-nodes) where they are
    fewer; every node's effect stays in effects.safetensors.
    """
    node_threshold: Magnitude | None = None
    """Keep nodes with a larger |effect| than this instead."""
    edges: Count | None = 1000
    """Edges kept in circuit.json, the strongest."""
    edge_threshold: Magnitude | None = None
    """Keep edges with a larger |weight| than this instead."""
    significant: bool = False
    """Of these nodes and edges keep only those whose bootstrap interval leaves out zero."""
    resamples: Resamples = 1000
    """Times the prompts, or their templates where they share them, are drawn anew for the intervals of effects (none
    for fewer than 5 of them); 0 leaves intervals out.
    """
    verify: Count = 0
    """Patch this many of the strongest nodes exactly and mark those whose estimate differs in sign or size."""
    text: str | None = None
    """Text on which the features of the circuit are described (their top tokens and contexts); the prompts by
    default.
    """
    title: str | None = None
    """What drawings and the report are headed; made from prompts and model by default."""
    estimate: bool = False
    """Run one batch of the prompts, say what memory and time all of them will take, and stop there."""
    resume: bool = False
    """Go on with an interrupted discovery of the same model, autoencoders, prompts and options."""
    options: DiscoverOptions = field(default_factory=DiscoverOptions)

    def run(self) -> Output:
        self._check()
        if self.estimate:
            return self._run(self.out / "circuit")
        with lock(self.out):
            return self._run(current().by_first(self._folder))

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import PARTIAL_FOLDER
        from circuits.cli.common import load_checked_saes, load_model
        from circuits.discovery.cost import estimate_discovery
        from circuits.discovery.description import describe_features
        from circuits.discovery.discover import discover
        from circuits.metrics.metrics import absolute, get_metric
        from circuits.metrics.probe import visible_sites
        from circuits.prompts.dataset import load_prompts
        from sae.model.sites import select_sites

        model = load_model(self.model, self, saes=self.saes)
        saes = load_checked_saes(model, self.saes, options=self)
        metric = get_metric(self.options.metric)
        saes = saes.subset(visible_sites(metric, model, select_sites(self.options.sites, list(saes))))
        options = replace(self.options, metric=absolute(self.options.metric))
        prompts = load_prompts(
            self.prompts, model, limit=self.examples, span_template=self.span_template, need_spans=self._needs_spans()
        )
        if self.estimate:
            estimate = estimate_discovery(model, saes, prompts, self.options)
            return Output(estimate.text(), {"estimate": estimate.to_dict()})
        circuit = discover(
            model, saes, prompts, options, provenance=self._provenance(prompts), progress=not self.quiet,
            partial=folder / PARTIAL_FOLDER, resume=self.resume,
        )  # fmt: skip
        if not current().is_first:  # the others have done their share
            return Output("", {})
        circuit = self._examined(circuit, prompts)
        texts = TextSource.of(self.text).read() if self.text else None
        features = describe_features(circuit, texts)
        graph = self._write(circuit, features, folder)
        counts = {"nodes": len(graph) - 1, "edges": graph.graph.number_of_edges()}
        data = {**circuit.metadata, "kept": counts, "circuit": str(folder), "estimate": None}
        return Output(_summary(circuit, prompts, folder, counts), data)

    def _examined(self, circuit: Circuit, prompts: PromptSet) -> Circuit:
        """The circuit with its intervals, and the strongest nodes verified."""
        from circuits.uncertainty.bootstrap import Bootstrap
        from circuits.uncertainty.intervals import with_uncertainty
        from circuits.uncertainty.verification import verified, verify

        if self.resamples:
            circuit = with_uncertainty(circuit, Bootstrap(resamples=self.resamples))
        if not self.verify:
            return circuit
        return verified(circuit, verify(circuit, prompts, nodes=self.verify, progress=not self.quiet))

    def _write(self, circuit: Circuit, features: Mapping[str, Any], folder: Path) -> FeatureGraph:
        """Write the circuit, pruned as the options say, and take away what was of the circuit before it."""
        from circuits.circuit import EFFECTS_FILE, FEATURES_FILE, GRAPH_FILE, PARTIAL_FOLDER
        from circuits.cli.common import record
        from circuits.discovery.resume import remove_partial

        by_threshold = self.node_threshold is not None
        graph = circuit.graph(
            nodes=self.options.edge_nodes or None if by_threshold else self.most_nodes,
            node_threshold=self.node_threshold,
            edges=self.edges if self.edge_threshold is None else None,
            edge_threshold=self.edge_threshold,
            significant=self.significant,
            attributes=features,
        )
        for outdated in (GRAPH_FILE, EFFECTS_FILE):  # there is no circuit until all of the new one is there
            (folder / outdated).unlink(missing_ok=True)
        remove(folder, MEASURED)
        set_edits_aside(self.out)
        write_json(folder / FEATURES_FILE, {"schema_version": 1, "features": features})
        record(self.out, "discover", self)
        circuit.save(folder, graph=graph)
        remove_partial(folder / PARTIAL_FOLDER)
        return graph

    def _folder(self) -> Path:
        """The folder of the circuit; one with a circuit or an interrupted discovery only where that was asked for."""
        from circuits.circuit import GRAPH_FILE, PARTIAL_FOLDER
        from circuits.discovery.resume import interrupted

        folder = self.out / "circuit"
        check_run_config(self.out)
        check_no_link(folder)
        check_contents(folder, CIRCUIT)
        if interrupted(folder / PARTIAL_FOLDER) and not self.resume and not self.overwrite:
            raise UserError(
                f"{str(folder)!r} holds an interrupted discovery: go on with --resume, or start again with --overwrite"
            )
        if self.resume and not interrupted(folder / PARTIAL_FOLDER) and visible(folder):
            finished = (folder / GRAPH_FILE).is_file()
            why = "its circuit is finished" if finished else "no discovery was begun there"
            raise UserError(f"nothing to resume in {str(folder)!r}: {why}; --overwrite begins again")
        return prepare_folder(folder, overwrite=self.overwrite or self.resume)

    @property
    def most_nodes(self) -> int:
        """Nodes kept where there is no threshold."""
        return self.nodes or min(NODES, self.options.edge_nodes or NODES)

    def _check(self) -> None:
        if self.node_threshold is None and self.nodes and 0 < self.options.edge_nodes < self.nodes:
            raise UserError(
                f"nodes is {self.nodes}, but edges are computed among {self.options.edge_nodes} nodes alone: "
                f"give --edge-nodes {self.nodes} as well"
            )

    def _needs_spans(self) -> bool:
        """Whether nodes live in spans, or the metric reads one."""
        from circuits.metrics.metrics import get_metric
        from circuits.prompts.spans import LAST

        position = getattr(get_metric(self.options.metric), "position", LAST)
        return self.options.aggregation == "spans" or position != LAST

    def _provenance(self, prompts: PromptSet) -> dict[str, Any]:
        from circuits.cli.common import absolute_path

        return {
            "model": absolute_path(self.model),
            "site_paths": self.site_paths,
            "saes": absolute_path(self.saes),
            "prompts": absolute_path(self.prompts),
            "prompts_fingerprint": prompts.fingerprint,
            "examples": self.examples,
            "span_template": self.span_template,
            "need_spans": self._needs_spans(),
            "title": self.title or f"{Path(self.prompts).stem} in {Path(self.model).name}",
        }


def set_edits_aside(run: Path) -> None:
    """Move `edits/NAME.json`, made through the circuit that was here, to `edits/earlier`: reports show those of the
    present circuit alone.
    """
    for path in sorted((run / "edits").glob("*.json")):
        try:
            if read_json(path).get("kind") != "edit":
                continue
        except UserError:  # damaged, or another program's
            continue
        aside = run / "edits" / "earlier" / path.name
        aside.parent.mkdir(exist_ok=True)
        number = 2
        while aside.exists():
            aside = aside.with_name(f"{path.stem}_{number}.json")
            number += 1
        path.rename(aside)


def _summary(circuit: Circuit, prompts: PromptSet, folder: Path, counts: dict[str, int]) -> str:
    from circuits.uncertainty.intervals import uncertainty_line

    meta = circuit.metadata
    right = "" if meta["accuracy"] is None else f"; the model is right on {meta['accuracy']:.1%}"
    lines = [
        f"{prompts.summary()}{right}",
        circuit.text(),
        f"kept {counts['nodes']} nodes and {counts['edges']} edges",
        *([uncertainty_line(circuit)] if "uncertainty" in meta else []),
        *([meta["verification"]["summary"]] if "verification" in meta else []),
        f"wrote {folder}",
    ]
    return "\n".join(lines)
