"""`sfc report`: everything a run found, on one page."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.cli.options import HasCircuit, Output, Overwrites, Prints
from sae._run.locks import lock


@dataclass(frozen=True, kw_only=True)
class ReportCommand(Prints, Overwrites, HasCircuit):
    """Write report.html: the circuit, what it explains, its features in their contexts, and what editing them did."""

    def run(self) -> Output:
        from circuits.report import write_report

        with lock(self.circuit, shared=True):
            path = write_report(self.circuit, overwrite=self.overwrite)
        return Output(f"wrote {path}", {"out": str(path)})
