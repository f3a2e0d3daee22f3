"""`sfc validate`: how far to trust a circuit, a verdict a line with its number and its interval."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from circuits.cli.options import HasTestPrompts, Named, Output, RunsCircuit, UsesSaes
from circuits.cli.results import ResultFiles, made_with
from circuits.options import ValidityOptions
from sae._run.locks import lock


@dataclass(frozen=True, kw_only=True)
class ValidateCommand(UsesSaes, Named, HasTestPrompts, RunsCircuit):
    """Put a circuit to the test: other samples and families of prompts, backups that take over, single prompts, exact
    patching, and where they are given other phrasings and other autoencoders.
    """

    reference: str | None = None
    """Prompts whose means or values ablated nodes take; those the circuit was found on by default."""
    paraphrases: str | None = None
    """Prompts of the same behaviour in other words."""
    other_saes: str | None = None
    """Other autoencoders of the same model, of another seed for example: a run folder, or what --saes may be."""
    options: ValidityOptions = field(default_factory=ValidityOptions)

    def run(self) -> Output:
        from circuits.circuit import circuit_folder

        with lock(circuit_folder(self.circuit).parent, shared=True):
            return self._run(circuit_folder(self.circuit))

    def _run(self, folder: Path) -> Output:
        from circuits.circuit import circuit_digest
        from circuits.cli.common import load_checked_saes, load_circuit, record
        from circuits.validity.validate import validate

        files = ResultFiles(
            folder, "validity", self, made_with(self, circuit=circuit_digest(folder)), suffixes=(".json",)
        )
        files.check()
        circuit = load_circuit(self)
        others = None if self.other_saes is None else load_checked_saes(circuit.model, self.other_saes, options=self)
        other_words = None if self.paraphrases is None else circuit.read_prompts(self.paraphrases, limit=self.examples)
        validity = validate(
            circuit,
            circuit.read_prompts(self.prompts, limit=self.examples),
            self.options,
            reference=circuit.read_prompts(self.reference),
            paraphrases=other_words,
            other_saes=others,
            progress=not self.quiet,
        )
        data = files.write(validity.to_dict())
        record(folder.parent, "validate", self, name=self.name)
        return Output(f"{validity.text()}\nwrote {files.path('.json')}", data)
