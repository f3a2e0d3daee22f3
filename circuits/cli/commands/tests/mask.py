"""`sfc mask`: learn which nodes to keep, and measure the ranking beside that by effects."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.cli.options import HasSizes, HasTestPrompts, Named, Output, RunsCircuit
from circuits.cli.results import ResultFiles, made_with
from circuits.options import FaithfulnessOptions, MaskOptions
from sae._options import Count, Positive, parse_sizes
from sae._run.locks import lock

if TYPE_CHECKING:
    from circuits.attribution.nodes import Nodes
    from circuits.circuit import Circuit
    from circuits.faithfulness.results import NodeFaithfulness
    from circuits.prompts.dataset import PromptSet


@dataclass(frozen=True, kw_only=True)
class MaskCommand(Named, HasSizes, HasTestPrompts, RunsCircuit):
    """Learn a ranking of the nodes by which of them to keep, all nodes together, and measure it on held-out prompts
    beside the ranking by effects.
    """

    learn_examples: Positive | None = None
    """At most this many of the prompts the mask is learned on, the first of the circuit's file; all by default, however
    many effects are from.
    """
    circuit_nodes: Count = 0
    """Write the so many nodes that are kept longest as a circuit, RUN/mask, which render, explore, ablate and the like
    take as --circuit; the prompts are gone through once more. 0 leaves it out.
    """
    options: MaskOptions = field(default_factory=MaskOptions)

    def run(self) -> Output:
        from circuits.circuit import circuit_folder

        parse_sizes(self.sizes)
        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._run(circuit_folder(self.circuit))

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import circuit_digest
        from circuits.cli.common import load_circuit, record
        from circuits.faithfulness.learned_mask import learn_mask, mask_circuit

        files = ResultFiles(
            folder, "mask", self, made_with(self, circuit=circuit_digest(folder)), suffixes=(".json", ".safetensors")
        )
        files.check()
        circuit = load_circuit(self)
        learned_on = circuit.read_prompts(circuit.metadata.get("prompts"), limit=self.learn_examples)
        prompts = learned_on[: self.examples]
        if self.prompts:
            prompts = circuit.read_prompts(self.prompts, limit=self.examples)
        begin = time.perf_counter()
        mask = learn_mask(circuit, learned_on, self.options, progress=not self.quiet)
        seconds = time.perf_counter() - begin
        files.path(".json").unlink(missing_ok=True)  # of the mask before
        mask.save(
            files.path(".safetensors"), overwrite=True
        )  # learned scores outlive a measurement that is interrupted
        of_mask, of_effects = (
            self._measured(circuit, nodes, prompts, learned_on) for nodes in (mask.nodes, circuit.nodes)
        )
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
        record(folder.parent, "mask", self)
        written = f"wrote {files.path('.json')} and {files.path('.safetensors')}"
        if self.circuit_nodes:
            of_nodes = mask_circuit(circuit, mask, self.circuit_nodes, progress=not self.quiet)
            written += f"\nwrote {of_nodes.save(folder.parent / files.path('').name / 'circuit')}"
        text = (
            f"{of_mask.n_prompts} {'held-out prompts' if self.prompts else 'prompts, those learned on'}; "
            f"{of_mask.setting()}\n"
            f"learned on {len(learned_on)} prompts in {seconds:.0f} s\n"
            f"{table(of_mask, of_effects)}\n"
            f"{written}"
        )
        return Output(text, data)

    def _measured(self, circuit: Circuit, nodes: Nodes, prompts: PromptSet, reference: PromptSet) -> NodeFaithfulness:
        """Faithfulness of a ranking of the circuit's nodes, ablated as while the mask was learned."""
        from circuits.faithfulness.nodes import measure_faithfulness

        options = FaithfulnessOptions(
            ablation=self.options.ablation, start_site=self.options.start_site, errors=self.options.errors,
            random=0, seed=self.options.seed, batch_size=self.options.batch_size,
        )  # fmt: skip
        return measure_faithfulness(
            circuit.setting(), nodes, prompts, options, sizes=parse_sizes(self.sizes), reference=reference,
            progress=not self.quiet,
        )  # fmt: skip


def table(of_mask: NodeFaithfulness, of_effects: NodeFaithfulness) -> str:
    """Faithfulness and completeness of both rankings, one row a size."""
    import pandas as pd

    curves = {
        (name, ranking): [f"{value:.3f}" for value in getattr(result, name)]
        for name in ("faithfulness", "completeness")
        for ranking, result in (("mask", of_mask), ("effects", of_effects))
    }
    return pd.DataFrame(curves, index=pd.Index(of_mask.sizes, name="nodes")).to_string()
