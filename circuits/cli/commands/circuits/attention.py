"""`sfc attention`: the heads behind a circuit's edges, and the features that make a head look where it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from circuits.cli.options import HasTestPrompts, Named, Output, RunsCircuit, UsesSaes
from circuits.cli.results import ResultFiles, made_with
from circuits.options import AttentionOptions
from sae._run.locks import lock


@dataclass(frozen=True, kw_only=True)
class AttentionCommand(UsesSaes, Named, HasTestPrompts, RunsCircuit):
    """Say why attention looks there: which heads carry the strongest edges through attention, and which pairs of
    features, one at the token that looks and one at the token looked at, make up a head's score before the softmax.
    Report and `sfc export` take it from circuit/attention.json.
    """

    options: AttentionOptions = field(default_factory=AttentionOptions)

    def run(self) -> Output:
        from circuits.circuit import circuit_folder

        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._run(circuit_folder(self.circuit))

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import circuit_digest
        from circuits.cli.common import load_circuit, record
        from circuits.discovery.attention.explain import explain_attention

        files = ResultFiles(
            folder, "attention", self, made_with(self, circuit=circuit_digest(folder)), suffixes=(".json",)
        )
        files.check()
        circuit = load_circuit(self)
        prompts = circuit.read_prompts(self.prompts, limit=self.examples)
        report = explain_attention(circuit, prompts, self.options, progress=not self.quiet)
        data = files.write(report.to_dict())
        record(folder.parent, "attention", self, name=self.name)
        return Output(f"{report.text()}\n\nwrote {files.path('.json')}", data)
