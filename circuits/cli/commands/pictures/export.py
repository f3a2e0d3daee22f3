"""`sfc export`: the circuit in the formats of other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from circuits.cli.commands.pictures.render import wrote
from circuits.cli.options import Common, HasCircuit, Output, Overwrites
from circuits.cli.results import circuit_file
from sae.errors import UserError

SUFFIXES = {"eap-ig": "eap_ig.json", "neuronpedia": "neuronpedia.json", "graphml": "graphml"}


@dataclass(frozen=True, kw_only=True)
class ExportCommand(Common, Overwrites, HasCircuit):
    """Write the circuit for other programs: EAP-IG and MIB, the viewers of circuit-tracer and Neuronpedia, GraphML."""

    format: Literal["eap-ig", "neuronpedia", "graphml"]
    """Format: eap-ig (also MIB's; projected onto heads and MLPs), neuronpedia (also circuit-tracer's) or graphml."""
    out: Path | None = None
    """File to write; graph/circuit with the format's ending in the run folder by default."""
    model: str | None = None
    """Another place of the model the circuit was found in; eap-ig reads the number of layers and heads from it."""

    def run(self) -> Output:
        self._check()
        from graphs._outputs import has_mark, is_eap_ig, is_neuronpedia

        marks = {"eap-ig": is_eap_ig, "neuronpedia": is_neuronpedia, "graphml": has_mark(".graphml")}
        name = f"circuit.{SUFFIXES[self.format]}"
        with circuit_file(self.circuit, self.out, name, marks[self.format], overwrite=self.overwrite) as out:
            return self._export(out)

    def _export(self, out: Path) -> Output:
        from circuits.circuit import GRAPH_FILE, circuit_folder
        from circuits.circuit_files import absolute_in_run, check_metadata
        from circuits.cli.common import load_model
        from circuits.labels import LabelsFile, labelled
        from graphs import FeatureGraph, write_eap_ig, write_graphml, write_neuronpedia

        folder = circuit_folder(self.circuit)
        graph = FeatureGraph.load(folder / GRAPH_FILE)
        check_metadata(graph.metadata, folder / GRAPH_FILE, circuit=False)
        names = LabelsFile.of(absolute_in_run(graph.metadata, folder.parent), folder.parent)
        graph = labelled(graph, names.read())
        if self.format == "eap-ig":
            name = self.model or absolute_in_run(graph.metadata, folder.parent).get("model")
            if name is None:
                raise UserError(f"{folder / GRAPH_FILE} names no model: give --model")
            model = load_model(name, self)
            heads = model.hf.config.num_attention_heads
            write_eap_ig(
                graph,
                out,
                overwrite=True,  # it was checked
                n_layers=model.n_layers,
                n_heads=heads,
                d_model=model.d_model,
                parallel=model.parallel_blocks,
            )
        elif self.format == "neuronpedia":
            write_neuronpedia(graph, out, overwrite=True)
        else:
            write_graphml(graph, out, overwrite=True)
        return wrote(graph, out)

    def _check(self) -> None:
        """`UserError` for options of the model where none is read."""
        unused = [name for name in ("model", "dtype", "site_paths") if getattr(self, name) is not None]
        unused += ["device"] if self.device != "auto" else []
        if unused and self.format != "eap-ig":
            raise UserError(f"{unused[0].replace('_', '-')} is given and not used: only format eap-ig reads the model")
