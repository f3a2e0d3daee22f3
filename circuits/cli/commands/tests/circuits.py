"""`sfc compare-circuits`: whether circuits describe the same mechanism."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from circuits.cli.options import Common, Output, Overwrites
from circuits.cli.results import write_with_table
from circuits.comparison.options import CompareCircuitsOptions
from sae._files import prepare_folder
from sae._run.contents import COMPARED_CIRCUITS, check_contents, remove
from sae._run.locks import lock
from sae._run.outputs import check_no_link
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.circuit import Circuit
    from circuits.comparison.circuit_results import CircuitComparison


LOADED_BY = ("model_fingerprint", "dtype", "quantize", "site_paths")
"""Metadata that are the same in circuits for which one loaded model does."""


@dataclass(frozen=True, kw_only=True)
class CompareCircuitsCommand(Common, Overwrites):
    """Compare circuits of two tasks, methods, checkpoints or seeds of autoencoders, every two of them: how far their
    nodes and edges overlap beyond chance, and what each carries of the other's behaviour.
    """

    circuits: Positional[tuple[Path, ...]]
    """Run folders with circuits (`sfc discover`), at least two."""
    metric: str | None = None
    """The circuits' metric again, where it is Python code (file.py:function): no code runs because a run names it."""
    out: Path | None = None
    """Folder that receives circuits.json, circuits.txt and a page for every two circuits; none by default."""
    options: CompareCircuitsOptions = field(default_factory=CompareCircuitsOptions)

    def run(self) -> Output:
        if len(self.circuits) < 2:
            raise UserError(f"{len(self.circuits)} circuit given: give the run folders of at least two")
        if self.out is None:
            return self._run(None)
        with lock(self.out):
            check_no_link(self.out)
            check_contents(self.out, COMPARED_CIRCUITS)
            return self._run(prepare_folder(self.out, overwrite=self.overwrite))

    def _run(self, folder: Path | None) -> Output:
        from circuits.comparison.circuits import compare_circuits

        circuits = self._load()
        comparison = compare_circuits(
            *circuits, options=self.options, names=short_names(self.circuits), progress=not self.quiet
        )
        data, text = comparison.to_dict(), comparison.text()
        if folder is not None:
            data, pages = self._write(comparison, folder)
            files = [folder / "circuits.json", folder / "circuits.txt", *pages]
            text = "\n".join([text, *(f"wrote {path}" for path in files)])
        return Output(text, data)

    def _load(self) -> list[Circuit]:
        from circuits.circuit import Circuit
        from circuits.cli.common import placed

        loaded: list[Circuit] = []
        for path in self.circuits:
            circuit = Circuit.load(path, metric=self.metric, **placed(self))
            same = [c for c in loaded if all(c.metadata.get(key) == circuit.metadata.get(key) for key in LOADED_BY)]
            if same:
                circuit.source.model = same[0].model
            loaded.append(circuit)
        return loaded

    def _write(self, comparison: CircuitComparison, folder: Path) -> tuple[dict[str, Any], list[Path]]:
        remove(folder, COMPARED_CIRCUITS, with_folder=False)
        numbers = [(i, j) for i in range(1, len(self.circuits)) for j in range(i + 1, len(self.circuits) + 1)]
        pages = [
            pair.picture(folder / f"circuits_{i}_{j}.html")
            for (i, j), pair in zip(numbers, comparison.pairs, strict=True)
        ]
        data = {**comparison.to_dict(), "pages": [page.name for page in pages]}
        return write_with_table(folder / "circuits.json", data, comparison.text() + "\n"), pages


def short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of each path, with the one before it where that tells them apart: `nounpp`, `seed1/nounpp`."""
    runs = [path.resolve() if path.name != "circuit" else path.resolve().parent for path in paths]
    names = [run.name for run in runs]
    return names if len(set(names)) == len(names) else [f"{run.parent.name}/{run.name}" for run in runs]
