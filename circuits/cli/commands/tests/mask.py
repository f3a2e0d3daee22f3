"""`sfc mask`: learn which nodes or edges to keep, and measure the ranking beside that by effects or weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.cli.options import HasSizes, HasTestPrompts, Named, Output, RunsCircuit
from circuits.cli.results import ResultFiles, made_with
from circuits.options import FaithfulnessOptions, MaskOptions
from sae._options import Count, Positive, parse_sizes
from sae._run.locks import lock
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.faithfulness.edge_mask import LearnedEdges
    from circuits.faithfulness.learned_mask import LearnedMask
    from circuits.faithfulness.results import Faithfulness
    from circuits.prompts.dataset import PromptSet


@dataclass(frozen=True, kw_only=True)
class MaskCommand(Named, HasSizes, HasTestPrompts, RunsCircuit):
    """Learn a ranking of the nodes by which of them to keep, all nodes together, and measure it on held-out prompts
    beside the ranking by effects; with --edges of the edges, beside that by weights.
    """

    learn_examples: Positive | None = None
    """At most this many of the prompts the mask is learned on, the first of the circuit's file; all by default, however
    many effects are from.
    """
    circuit_nodes: Count = 0
    """Write the so many nodes that are kept longest as a circuit, RUN/mask, which render, explore, ablate and the like
    take as --circuit; the prompts are gone through once more. 0 leaves it out.
    """
    edges: bool = False
    """Learn which of the circuit's edges to keep instead, jointly with the nodes they join; budgets (--smallest,
    --largest) are numbers of edges then.
    """
    edge_sizes: str = "20,50,100,200,500,1000,2000"
    """With --edges: numbers of edges to measure, comma-separated."""
    circuit_edges: Count = 0
    """With --edges: write the so many edges that are kept longest, and the nodes they join, as a circuit,
    RUN/edge_mask, which other commands take as --circuit. 0 leaves it out.
    """
    options: MaskOptions = field(default_factory=MaskOptions)

    def run(self) -> Output:
        from circuits.circuit import circuit_folder

        if self.circuit_nodes and self.edges:
            raise UserError("with --edges the mask is on edges: --circuit-edges writes them as a circuit")
        if self.circuit_edges and not self.edges:
            raise UserError("circuit-edges is for a mask on edges: give --edges, or --circuit-nodes")
        parse_sizes(self.sizes)
        parse_sizes(self.edge_sizes, "edge-sizes")
        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._run(circuit_folder(self.circuit))

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import circuit_digest
        from circuits.cli.common import load_circuit, record

        stem, options = "edge_mask" if self.edges else "mask", made_with(self, circuit=circuit_digest(folder))
        files = ResultFiles(folder, stem, self, options, suffixes=(".json", ".safetensors"))
        files.check()
        circuit = load_circuit(self)
        learned_on = circuit.read_prompts(circuit.metadata.get("prompts"), limit=self.learn_examples)
        prompts = learned_on[: self.examples]
        if self.prompts:
            prompts = circuit.read_prompts(self.prompts, limit=self.examples)
        begin = time.perf_counter()
        mask = self._learn(circuit, learned_on)
        seconds = time.perf_counter() - begin
        files.path(".json").unlink(missing_ok=True)  # of the mask before
        mask.save(
            files.path(".safetensors"), overwrite=True
        )  # learned scores outlive a measurement that is interrupted
        of_mask, of_effects = self._measured(circuit, mask, prompts, learned_on)
        data = {
            "schema_version": 1,
            "options": mask.options,
            "losses": mask.losses,
            "seconds": seconds,
            "n_learned_on": len(learned_on),
            "held_out": self.prompts is not None,
            "mask": of_mask.to_dict(),
            "effects": of_effects.to_dict(),
        }
        data = replace(files, suffixes=(".json",)).write(data)
        record(folder.parent, "mask", self, name=self.name)
        written = f"wrote {files.path('.json')} and {files.path('.safetensors')}"
        if smaller := self._circuit(circuit, mask):
            written += f"\nwrote {smaller.save(folder.parent / files.path('').name / 'circuit')}"
        text = (
            f"{of_mask.n_prompts} {'held-out prompts' if self.prompts else 'prompts, those learned on'}"
            f"{of_mask.left_out}; {_setting(of_mask)}\n"
            f"learned on {len(learned_on)} prompts in {seconds:.0f} s\n"
            f"{table(of_mask, of_effects)}\n"
            f"{written}"
        )
        return Output(text, data)

    def _learn(self, circuit: Circuit, prompts: PromptSet) -> LearnedMask | LearnedEdges:
        from circuits.faithfulness.edge_mask import learn_edge_mask
        from circuits.faithfulness.learned_mask import learn_mask

        learn = learn_edge_mask if self.edges else learn_mask
        return learn(circuit, prompts, self.options, progress=not self.quiet)

    def _circuit(self, circuit: Circuit, mask: LearnedMask | LearnedEdges) -> Circuit | None:
        """The nodes or edges that stay longest as a circuit, where that was asked for."""
        from circuits.faithfulness.edge_mask import LearnedEdges, edge_mask_circuit
        from circuits.faithfulness.learned_mask import mask_circuit

        if isinstance(mask, LearnedEdges):
            n = self.circuit_edges
            return edge_mask_circuit(circuit, mask, n, progress=not self.quiet) if n else None
        n = self.circuit_nodes
        return mask_circuit(circuit, mask, n, progress=not self.quiet) if n else None

    def _measured(
        self, circuit: Circuit, mask: LearnedMask | LearnedEdges, prompts: PromptSet, reference: PromptSet
    ) -> Sequence[Faithfulness]:
        """Faithfulness of the mask's ranking, and of that by effects or weights, ablated as while it was learned."""
        from circuits.faithfulness.edge_mask import LearnedEdges
        from circuits.faithfulness.edges import edge_faithfulness
        from circuits.faithfulness.nodes import measure_faithfulness

        options = FaithfulnessOptions(
            ablation=self.options.ablation, start_site=self.options.start_site, errors=self.options.errors,
            random=0, seed=self.options.seed, batch_size=self.options.batch_size,
        )  # fmt: skip
        if isinstance(mask, LearnedEdges):
            sizes = parse_sizes(self.edge_sizes, "edge-sizes")
            return [
                edge_faithfulness(replace(circuit, edges=edges), prompts, options, sizes=sizes, reference=reference,
                                  progress=not self.quiet)
                for edges in (mask.edges, circuit.edges)
            ]  # fmt: skip
        return [
            measure_faithfulness(
                circuit.setting(), nodes, prompts, options, sizes=parse_sizes(self.sizes), reference=reference,
                progress=not self.quiet,
            )
            for nodes in (mask.nodes, circuit.nodes)
        ]  # fmt: skip


def _setting(result: Faithfulness) -> str:
    """Words for which nodes are ablated, and how."""
    from circuits.faithfulness.results import NodeFaithfulness

    if isinstance(result, NodeFaithfulness):
        return result.setting()
    return f"edges from {result.start_site} on among {result.n_nodes} nodes, other inputs ablated by {result.ablation}"


def table(of_mask: Faithfulness, of_effects: Faithfulness) -> str:
    """Both rankings, one row a size: faithfulness, and of nodes completeness."""
    import pandas as pd

    from circuits.faithfulness.results import NodeFaithfulness

    of_nodes = isinstance(of_mask, NodeFaithfulness)
    curves = {
        (name, ranking): [f"{value:.3f}" for value in getattr(result, name)]
        for name in (("faithfulness", "completeness") if of_nodes else ("faithfulness",))
        for ranking, result in (("mask", of_mask), ("effects" if of_nodes else "weights", of_effects))
    }
    return pd.DataFrame(curves, index=pd.Index(of_mask.sizes, name="nodes" if of_nodes else "edges")).to_string()
