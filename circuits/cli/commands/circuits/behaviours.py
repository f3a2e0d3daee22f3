"""`sfc behaviours`: behaviours that nobody listed, found in a text, with a circuit for each."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from circuits.behaviours.options import BehaviourSearchOptions
from circuits.cli.options import HasModel, HasSaes, HasText, Output, Overwrites, UsesSaes
from circuits.cli.results import write_with_table
from sae._files import prepare_folder
from sae._run.contents import BEHAVIOURS, check_contents, check_run_config, remove, visible
from sae._run.locks import lock
from sae._run.outputs import check_no_link
from sae.errors import UserError

RESULT_FILE = "behaviours.json"


@dataclass(frozen=True, kw_only=True)
class BehavioursCommand(UsesSaes, Overwrites, HasText, HasSaes, HasModel):
    """Find behaviours in a text: contexts whose next token the model predicts well, clustered by the features that
    predict it, with a circuit for each of the first clusters and one page to read them on.
    """

    out: Path
    """Folder that receives index.html, behaviours.json and a folder for every cluster with a circuit."""
    resume: bool = False
    """Go on with an interrupted search of the same model, autoencoders, text and options."""
    options: BehaviourSearchOptions = field(default_factory=BehaviourSearchOptions)

    def run(self) -> Output:
        with lock(self.out):
            return self._run(self._folder())

    def _folder(self) -> Path:
        """The folder; one with an earlier or interrupted search only where that was asked for."""
        from circuits.circuit import PARTIAL_FOLDER
        from circuits.discovery.resume import interrupted

        check_no_link(self.out)
        check_run_config(self.out)
        check_contents(self.out, BEHAVIOURS)
        begun = interrupted(self.out / PARTIAL_FOLDER)
        if begun and not (self.resume or self.overwrite):
            raise UserError(
                f"{str(self.out)!r} holds an interrupted search: go on with --resume, or start again with --overwrite"
            )
        if self.resume and visible(self.out) and not begun:
            raise UserError(f"nothing to resume in {str(self.out)!r}: its search has ended; --overwrite begins again")
        if self.overwrite and not self.resume:
            remove(self.out, BEHAVIOURS, with_folder=False)
        return prepare_folder(self.out, overwrite=self.overwrite or self.resume)

    def _run(self, folder: Path) -> Output:
        from circuits.behaviours.find import find_behaviours
        from circuits.circuit import PARTIAL_FOLDER
        from circuits.cli.common import load_checked_saes, load_model, record
        from circuits.discovery.resume import remove_partial

        model = load_model(self.model, self, saes=self.saes)
        saes = load_checked_saes(model, self.saes, options=self)
        behaviours = find_behaviours(
            model, saes, self.text, self.options, out=folder, resume=self.resume, provenance=self._provenance(),
            progress=not self.quiet,
        )  # fmt: skip
        page = behaviours.write_page(folder, title=f"Behaviours of {Path(self.model).name}", overwrite=True)
        text = behaviours.text()
        data = write_with_table(folder / RESULT_FILE, behaviours.to_dict(), text + "\n")
        record(folder, "behaviours", self)
        remove_partial(folder / PARTIAL_FOLDER)
        return Output(f"{text}\nwrote {folder / RESULT_FILE} and {page}", {**data, "page": str(page)})

    def _provenance(self) -> dict[str, Any]:
        from circuits.cli.common import absolute_path

        return {"model": absolute_path(self.model), "site_paths": self.site_paths, "saes": absolute_path(self.saes)}
