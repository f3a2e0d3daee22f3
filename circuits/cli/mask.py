"""`sfc mask`: learn which nodes to keep, and measure the ranking beside that by effects."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from circuits.attribution.nodes import Nodes
from circuits.circuit import circuit_digest, circuit_folder
from circuits.cli.common import Common, Loaded, Output, record
from circuits.cli.faithfulness import ERRORS_TEXT
from circuits.cli.results import Named, ResultFiles, made_with
from circuits.faithfulness.learned_mask import MaskOptions, learn_mask
from circuits.faithfulness.nodes import FaithfulnessOptions, measure_faithfulness
from circuits.faithfulness.results import NodeFaithfulness
from sae._options import Positive, parse_sizes
from sae._run.locks import lock


@dataclass(frozen=True, kw_only=True)
class MaskCommand(Common, Named):
    """Learn a ranking of the nodes by which of them to keep, all nodes together, and measure it on held-out prompts
    beside the ranking by effects.
    """

    circuit: Path
    """Run folder with a circuit (`sfc discover`); the mask is learned on the prompts of its file."""
    learn_examples: Positive | None = None
    """At most this many of the prompts learned on, the first ones; all by default, however many effects are from."""
    prompts: str | None = None
    """Held-out prompts to measure on; those the mask is learned on by default."""
    examples: Positive | None = None
    """At most this many of the prompts measured on; all by default."""
    sizes: str = "10,20,50,100,200,500,1000"
    """Numbers of nodes, comma-separated."""
    model: str | None = None
    """Another place of the model the circuit was found in."""
    saes: str | None = None
    """Another place of the autoencoders the circuit was found with."""
    metric: str | None = None
    """The circuit's metric again, where it is Python code (file.py:function): no code runs because a run names it."""
    options: Annotated[MaskOptions, tyro.conf.arg(name="")] = field(default_factory=MaskOptions)

    def run(self) -> Output:
        parse_sizes(self.sizes)
        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._run()

    def _run(self) -> Output:
        folder = circuit_folder(self.circuit)
        files = ResultFiles(
            folder, "mask", self, made_with(self, circuit=circuit_digest(folder)), suffixes=(".json", ".safetensors")
        )
        files.check()
        sizes = parse_sizes(self.sizes)
        loaded = Loaded.of(self.circuit, self, model=self.model, saes=self.saes, metric=self.metric)
        learned_on = loaded.prompts(loaded.circuit.metadata["prompts"], limit=self.learn_examples)
        prompts = loaded.prompts(self.prompts, limit=self.examples) if self.prompts else learned_on[: self.examples]
        metric = loaded.metric
        begin = time.perf_counter()
        mask = learn_mask(loaded.circuit, learned_on, self.options, progress=not self.quiet)
        seconds = time.perf_counter() - begin
        files.path(".json").unlink(missing_ok=True)  # of the mask before
        mask.save(files.path(".safetensors"))  # learned scores outlive a measurement that is interrupted
        options = FaithfulnessOptions(
            ablation=self.options.ablation, start_site=self.options.start_site, errors=self.options.errors,
            random=0, seed=self.options.seed, batch_size=self.options.batch_size,
        )  # fmt: skip

        def measured(nodes: Nodes) -> NodeFaithfulness:
            return measure_faithfulness(
                loaded.model, loaded.saes, nodes, prompts, options, sizes=sizes, reference=learned_on, metric=metric,
                progress=not self.quiet,
            )  # fmt: skip

        of_mask, of_effects = measured(mask.nodes), measured(loaded.circuit.nodes)
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
        text = (
            f"{of_mask.n_prompts} {'held-out prompts' if self.prompts else 'prompts, those learned on'}; "
            f"nodes from {of_mask.start_site} on, others ablated by {of_mask.ablation}{ERRORS_TEXT[of_mask.errors]}\n"
            f"learned on {len(learned_on)} prompts in {seconds:.0f} s\n"
            f"{table(of_mask, of_effects)}\n"
            f"wrote {files.path('.json')} and {files.path('.safetensors')}"
        )
        return Output(text, data)


def table(of_mask: NodeFaithfulness, of_effects: NodeFaithfulness) -> str:
    """Faithfulness and completeness of both rankings, one row a size."""
    lines = [
        f"{'':>7}  {'faithfulness':>16}  {'completeness':>16}",
        f"{'nodes':>7}  {'mask':>7}  {'effects':>7}  {'mask':>7}  {'effects':>7}",
    ]
    for row, size in enumerate(of_mask.sizes):
        numbers = (
            of_mask.faithfulness[row], of_effects.faithfulness[row],
            of_mask.completeness[row], of_effects.completeness[row],
        )  # fmt: skip
        lines.append("  ".join([f"{size:>7}", *(f"{number:>7.3f}" for number in numbers)]))
    return "\n".join(lines)
