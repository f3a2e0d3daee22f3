"""`sfc report`: everything a run found, on one page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from circuits.cli.common import Output
from circuits.report import write_report
from sae._run.locks import lock


@dataclass(frozen=True, kw_only=True)
class ReportCommand:
    """Write report.html: the circuit, what it explains, its features in their contexts, and what editing them did."""

    circuit: Path
    """Run folder with a circuit (`sfc discover`)."""
    json: bool = False
    """Print one JSON object instead of text."""

    def run(self) -> Output:
        with lock(self.circuit, shared=True):
            path = write_report(self.circuit)
        return Output(f"wrote {path}", {"out": str(path)})
