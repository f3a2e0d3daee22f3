"""`sfc export`: the circuit in the formats of other programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from circuits.circuit import GRAPH_FILE, circuit_folder
from circuits.commands.common import Common, Output, load_model
from graphs.feature_graph import FeatureGraph
from graphs.formats.eap_ig import write_eap_ig
from graphs.formats.graphml import write_graphml
from graphs.formats.neuronpedia import write_neuronpedia

SUFFIXES = {"eap-ig": "eap_ig.json", "neuronpedia": "neuronpedia.json", "graphml": "graphml"}


@dataclass(frozen=True, kw_only=True)
class Export(Common):
    """Write the circuit for other programs: EAP-IG and MIB, the viewers of circuit-tracer and Neuronpedia, GraphML."""

    circuit: Path
    """Run folder with a circuit (`sfc discover`); its circuit.json is exported."""
    format: Literal["eap-ig", "neuronpedia", "graphml"]
    """Format: eap-ig (also MIB's; projected onto heads and MLPs), neuronpedia (also circuit-tracer's) or graphml."""
    out: Path | None = None
    """File to write; graph/circuit with the format's ending in the run folder by default."""
    model: str | None = None
    """Another place of the model the circuit was found in; eap-ig reads the number of layers and heads from it."""

    def run(self) -> Output:
        folder = circuit_folder(self.circuit)
        graph = FeatureGraph.load(folder / GRAPH_FILE)
        out = self.out or folder.parent / "graph" / f"circuit.{SUFFIXES[self.format]}"
        if self.format == "eap-ig":
            model = load_model(self.model or graph.metadata["model"], self)
            heads = model.hf.config.num_attention_heads
            write_eap_ig(
                graph,
                out,
                n_layers=model.n_layers,
                n_heads=heads,
                d_model=model.d_model,
                parallel=model.parallel_blocks,
            )
        elif self.format == "neuronpedia":
            write_neuronpedia(graph, out)
        else:
            write_graphml(graph, out)
        nodes, edges = len(graph) - 1, graph.graph.number_of_edges()
        return Output(f"wrote {out} ({nodes} nodes, {edges} edges)", {"out": str(out), "nodes": nodes, "edges": edges})
