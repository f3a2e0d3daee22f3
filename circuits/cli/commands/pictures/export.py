"""`sfc export`: the circuit in the formats of other programs."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from circuits.cli.commands.pictures.render import wrote
from circuits.cli.options import Common, HasCircuit, Output, Overwrites
from circuits.cli.results import circuit_file
from sae._options import ContextLength, TokenCount
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from graphs import FeatureGraph
    from sae.model.language_model import LanguageModel

SUFFIXES = {"eap-ig": "eap_ig.json", "neuronpedia": "neuronpedia.json", "graphml": "graphml"}
MODEL = ("model", "dtype", "site_paths", "device", "device_map", "quantize", "remote")
DELPHI = "delphi"
MIB = "mib"
FOLDER = "circuit-tracer"
"""Of the page's files, in graph/."""
VIEWERS = ("neuronpedia", FOLDER)
"""Formats of the viewers."""


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Common, Overwrites, HasCircuit):
    """Write the circuit for other programs: EAP-IG and MIB, the viewers of circuit-tracer and Neuronpedia, GraphML."""

    format: Literal["eap-ig", "mib", "neuronpedia", "circuit-tracer", "graphml", "delphi"]
    """Format: eap-ig (the circuit projected onto heads and MLPs), mib (a submission to MIB's circuit track, which
    --task says more of), neuronpedia (a file to upload), circuit-tracer (a folder that its page opens, with the
    features' contexts), graphml, or delphi (a folder with the activations of the circuit's features on --text, from
    which delphi explains and scores them).
    """
    out: Path | None = None
    """File to write, graph/circuit with the format's ending in the run folder by default; for circuit-tracer, mib and
    delphi a folder, graph/circuit-tracer, graph/mib or graph/delphi.
    """
    slug: str | None = None
    """Name of the graph in the viewers, of letters a to z, digits, and _ . -; by default made of its title."""
    scan: str | None = None
    """The viewers' name of the model, such as gemma-2-2b, or MIB's: gpt2, qwen2.5, gemma2 or llama3; by default made of
    the model's.
    """
    task: str | None = None
    """For mib: the task the circuit is of, ioi, mcqa, arithmetic-addition, arithmetic-subtraction, arc-easy or
    arc-challenge. Nine circuits of whole heads and MLPs are written, scored by the circuit's own method on its own
    prompts: these are MIB's nodes, and features cannot be said there.
    """
    features_url: str | None = None
    """For neuronpedia: address of a public folder with the feature files that format circuit-tracer writes, from which
    it shows contexts.
    """
    text: str | None = None
    """For delphi: text, .txt or .jsonl, or a hub data set."""
    tokens: TokenCount | None = None
    """For delphi: tokens of the text that are read at most, 1,000,000 by default."""
    context_length: ContextLength | None = None
    """For delphi: tokens of a row, 256 by default."""
    model: str | None = None
    """Another place of the model the circuit was found in; eap-ig reads the number of layers and heads from it."""

    def run(self) -> Output:
        self._check()
        from graphs._outputs import has_mark, is_eap_ig, is_neuronpedia

        if self.format == FOLDER:
            return self._export_folder()
        if self.format == DELPHI:
            return self._export_delphi()
        if self.format == MIB:
            return self._export_mib()
        marks = {"eap-ig": is_eap_ig, "neuronpedia": is_neuronpedia, "graphml": has_mark(".graphml")}
        name = f"circuit.{SUFFIXES[self.format]}"
        with circuit_file(self.circuit, self.out, name, marks[self.format], overwrite=self.overwrite) as out:
            return self._export(out)

    def _export(self, out: Path) -> Output:
        from circuits.circuit import circuit_folder
        from circuits.cli.common import load_model
        from graphs import write_eap_ig, write_graphml, write_neuronpedia

        graph, metadata = self._graph()
        if self.format == "eap-ig":
            name = self.model or metadata.get("model")
            if name is None:
                raise UserError(f"the circuit in {str(circuit_folder(self.circuit))!r} names no model: give --model")
            model = load_model(name, self)
            write_eap_ig(graph, out, overwrite=True, **_shape(model))  # it was checked
        elif self.format == "neuronpedia":
            names = {"scan": self.scan or "", "slug": self.slug or "", "features_url": self.features_url or ""}
            write_neuronpedia(graph, out, overwrite=True, **names)
        else:
            write_graphml(graph, out, overwrite=True)
        return wrote(graph, out)

    def _export_folder(self) -> Output:
        from circuits.circuit import circuit_folder
        from circuits.feature_pages import with_pages
        from graphs import GraphError, write_circuit_tracer
        from graphs.formats.circuit_tracer import page_address
        from sae._run.locks import lock
        from sae._run.outputs import check_no_link

        run = circuit_folder(self.circuit).parent
        folder = self.out or run / "graph" / FOLDER
        check_no_link(folder)
        with lock(run if self.out is None else folder.parent, shared=True):
            graph = with_pages(self._graph()[0], run, full=True)
            try:
                names = {"scan": self.scan or "", "slug": self.slug or ""}
                out = write_circuit_tracer(graph, folder, overwrite=self.overwrite, **names)
            except GraphError as error:
                raise UserError(str(error).replace("overwrite=True", "--overwrite")) from None
        address, output = page_address(out), wrote(graph, out)
        serve = f"circuit-tracer start-server --graph_file_dir {shlex.quote(str(folder))}"
        text = f"{output.text}\nto see it: {serve}\nand open {address}"
        return replace(output, text=text, data={**output.data, "folder": str(folder), "address": address})

    def _loaded(self) -> Circuit:
        """The circuit, with its model."""
        from circuits.circuit import Circuit
        from circuits.cli.common import placed

        return Circuit.load(self.circuit, model=self.model, **placed(self))

    def _export_mib(self) -> Output:
        from circuits.benchmark.components import component_effects
        from circuits.circuit import circuit_folder
        from circuits.options import QuadratureOptions
        from graphs import GraphError
        from graphs.formats.mib import MODELS, check_column, write_mib
        from sae._run.locks import lock
        from sae._run.outputs import check_no_link

        if self.task is None:
            raise UserError("MIB's folders are called by task and model: give --task, such as ioi")
        folder = self.out or circuit_folder(self.circuit).parent / "graph" / MIB
        check_no_link(folder)
        with lock(circuit_folder(self.circuit).parent, shared=True):
            circuit = self._loaded()
            name = self.model or circuit.metadata.get("model")
            scan = self.scan or next((short for short, names in MODELS.items() if name in names), str(name))
            if self.scan is None and scan not in MODELS:
                raise UserError(f"model is {name!r}: MIB has {', '.join(MODELS)}, and --scan says which of these it is")
            check_column(self.task, scan)
            found_with, shape = circuit.metadata["options"], _shape(circuit.model)
            method, names = found_with["method"], [field.name for field in fields(QuadratureOptions)]
            effects = component_effects(
                circuit.model, circuit.prompts, method=method, metric=circuit.metric, progress=not self.quiet,
                **{name: found_with[name] for name in names if name in found_with},
            )  # fmt: skip
            try:
                paths = write_mib(effects, folder, task=self.task, model=scan, overwrite=self.overwrite, **shape)
            except GraphError as error:
                raise UserError(str(error).replace("overwrite=True", "--overwrite")) from None
        text = (
            f"wrote {paths[0].parent} ({len(paths)} circuits of {len(effects)} heads, MLPs and input, by {method})\n"
            f"MIB takes public folders of the hub with two tasks and two models or more in them, as {folder}"
        )
        return Output(text, {"out": str(paths[0].parent), "files": [str(path) for path in paths], "effects": effects})

    def _export_delphi(self) -> Output:
        from circuits.circuit import circuit_folder
        from sae._run.locks import lock
        from sae._run.outputs import check_no_link
        from sae.data.batches import context_of
        from sae.features.delphi import write_delphi_cache

        if self.text is None:
            raise UserError("delphi explains features from text: give --text")
        folder = self.out or circuit_folder(self.circuit).parent / "graph" / DELPHI
        check_no_link(folder)
        with lock(circuit_folder(self.circuit).parent, shared=True):
            circuit = self._loaded()
            features = circuit.features_with_edges()
            length = context_of(circuit.model, self.context_length or 256)
            write_delphi_cache(
                circuit.model, circuit.saes.subset(features), self.text, folder, features=features,
                n_tokens=self.tokens or 10**6, length=length, overwrite=self.overwrite,
            )  # fmt: skip
        n = sum(map(len, features.values()))
        text = f"wrote {folder} ({n} features at {len(features)} sites); delphi reads it as raw_dir"
        return Output(text, {"out": str(folder), "features": n, "sites": [site.name for site in features]})

    def _graph(self) -> tuple[FeatureGraph, dict[str, Any]]:
        """The graph with the names of its features, and its metadata with paths as they are now."""
        from circuits._circuit_files import absolute_in_run, check_metadata
        from circuits.circuit import GRAPH_FILE, circuit_folder
        from circuits.discovery.attention.stored import with_traces
        from circuits.labels import LabelsFile, labelled, read_supernodes
        from graphs import FeatureGraph

        folder = circuit_folder(self.circuit)
        graph = FeatureGraph.load(folder / GRAPH_FILE)
        check_metadata(graph.metadata, folder / GRAPH_FILE, circuit=False)
        metadata = absolute_in_run(graph.metadata, folder.parent)
        if groups := read_supernodes(folder, metadata.get("digest")):
            graph.metadata["supernodes"] = groups
        graph = with_traces(graph, folder) if self.format in VIEWERS else graph
        return labelled(graph, LabelsFile.of(metadata, folder.parent).read()), metadata

    def _check(self) -> None:
        """`UserError` for options that the format does not read."""
        formats = {
            **dict.fromkeys(MODEL, ("eap-ig", MIB, DELPHI)),
            "task": (MIB,),
            **dict.fromkeys(("text", "tokens", "context_length"), (DELPHI,)),
            "slug": VIEWERS,
            "scan": (*VIEWERS, MIB),
            "features_url": ("neuronpedia",),
        }
        for name, allowed in formats.items():
            if getattr(self, name) not in (None, "auto") and self.format not in allowed:
                what = "the model" if name in MODEL else "it"
                readers = " and ".join(allowed)
                option = name.replace("_", "-")
                raise UserError(f"{option} is given and not used: only format {readers} reads {what}")


def _shape(model: LanguageModel) -> dict[str, Any]:
    """The model's shape in the keys of EAP-IG and MIB."""
    heads = getattr(model.hf.config.get_text_config(), "num_attention_heads", None)
    if heads is None:
        raise UserError(f"eap-ig and mib name attention heads, and model {model.name!r} has none: take another format")
    return {"n_layers": model.n_layers, "n_heads": heads, "d_model": model.d_model, "parallel": model.parallel_blocks}
