"""`sfc faithfulness`: how much of the behaviour the circuit explains by itself, over sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.cli.options import HasSizes, HasTestPrompts, Named, Output, RunsCircuit, UsesSaes
from circuits.cli.results import ResultFiles, made_with
from circuits.options import FaithfulnessOptions
from sae._options import parse_sizes
from sae._run.locks import lock

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.faithfulness.results import EdgeFaithfulness
    from circuits.prompts.dataset import PromptSet


@dataclass(frozen=True, kw_only=True)
class FaithfulnessCommand(UsesSaes, Named, HasSizes, HasTestPrompts, RunsCircuit):
    """Measure how much of the behaviour the strongest nodes explain when all others are ablated, and how much is
    left without them.
    """

    reference: str | None = None
    """Prompts whose means or values ablated nodes take; those the circuit was found on by default."""
    edges: bool = False
    """Measure the edges as well: each node recomputed from only those nodes whose edge to it is kept."""
    edge_sizes: str = "100,200,500,1000,2000,5000"
    """Numbers of edges, comma-separated."""
    options: FaithfulnessOptions = field(default_factory=FaithfulnessOptions)

    def run(self) -> Output:
        from circuits.circuit import circuit_folder

        parse_sizes(self.sizes)
        parse_sizes(self.edge_sizes, "edge-sizes")
        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._run(circuit_folder(self.circuit))

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import circuit_digest
        from circuits.cli.common import load_circuit, record
        from circuits.faithfulness.nodes import faithfulness

        options = made_with(self, circuit=circuit_digest(folder))
        files = ResultFiles(folder, "faithfulness", self, options)
        of_edges = ResultFiles(folder, "edge_faithfulness", self, options)
        for to_write in (files, of_edges) if self.edges else (files,):
            to_write.check()
        circuit = load_circuit(self)
        reference = circuit.read_prompts(self.reference)
        prompts = circuit.read_prompts(self.prompts, limit=self.examples)
        result = faithfulness(
            circuit, prompts, self.options, sizes=parse_sizes(self.sizes), reference=reference,
            progress=not self.quiet,
        )  # fmt: skip
        data = files.write(result.to_dict())
        plot = result.plot(files.path(".svg"))
        record(folder.parent, "faithfulness", self, name=self.name)
        text = f"{result.text()}\nwrote {files.path('.json')} and {plot}"
        if not self.edges:
            return Output(text, data)
        curve = self._edges(circuit, prompts, reference)
        of_edges_data = of_edges.write(curve.to_dict())
        curve.plot(of_edges.path(".svg"))
        return Output(f"{text}\n{curve.text()}", data | {"edges": of_edges_data})

    def _edges(self, circuit: Circuit, prompts: PromptSet, reference: PromptSet) -> EdgeFaithfulness:
        """The curve over edges."""
        from circuits.faithfulness.edges import edge_faithfulness

        return edge_faithfulness(
            circuit,
            prompts,
            self.options,
            sizes=parse_sizes(self.edge_sizes, "edge-sizes"),
            reference=reference,
            progress=not self.quiet,
        )
