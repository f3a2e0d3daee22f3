"""`sfc compare-methods`: node methods beside each other on held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from circuits.cli.options import HasModel, HasSaes, Output, Overwrites, UsesSaes
from circuits.cli.results import write_with_table
from circuits.comparison.options import CompareOptions
from sae._files import prepare_folder
from sae._options import Positive
from sae._run.contents import COMPARISON, check_contents, check_run_config, remove
from sae._run.locks import lock
from sae._run.outputs import check_no_link

if TYPE_CHECKING:
    from circuits.prompts.dataset import PromptSet
    from sae.model.language_model import LanguageModel

COMPARISON_FILE = "comparison.json"


@dataclass(frozen=True, kw_only=True)
class CompareMethodsCommand(UsesSaes, Overwrites, HasSaes, HasModel):
    """Compare node methods on one behaviour: how good their circuits are on held-out prompts, how well they agree with
    exact patching, and what they cost.
    """

    prompts: str
    """Prompts on which circuits are found."""
    test: str | None = None
    """Held-out prompts on which circuits are scored; by default half of the prompts is held out, of each case and
    template, and never one whose mirror image (clean and patch swapped) circuits are found on."""
    out: Path
    """Run folder that receives comparison/."""
    examples: Positive = 100
    """Prompts used of each file: the first ones, or some of each case and template where these miss one."""
    options: CompareOptions = field(default_factory=CompareOptions)

    def run(self) -> Output:
        with lock(self.out):
            return self._run(self._folder())

    def _folder(self) -> Path:
        folder = self.out / "comparison"
        check_run_config(self.out)
        check_no_link(folder)
        check_contents(folder, COMPARISON)
        return prepare_folder(folder, overwrite=self.overwrite)

    def _run(self, folder: Path) -> Output:
        from circuits.cli.common import load_checked_saes, load_model, record
        from circuits.comparison.compare import compare_methods

        model = load_model(self.model, self, saes=self.saes)
        saes = load_checked_saes(model, self.saes, options=self)
        train, test = self._prompts(model)
        comparison = compare_methods(model, saes, train, test, self.options, progress=not self.quiet)
        data = comparison.to_dict()
        remove(folder, COMPARISON)  # drawing and table of an earlier one
        text = comparison.text()
        data = write_with_table(folder / COMPARISON_FILE, data, text + "\n")
        drawing = comparison.plot(folder / "comparison.svg")
        record(self.out, "compare-methods", self)
        return Output(f"{text}\nwrote {folder / COMPARISON_FILE} and {drawing}", {**data, "comparison": str(folder)})

    def _prompts(self, model: LanguageModel) -> tuple[PromptSet, PromptSet]:
        from circuits.comparison.held_out import hold_out_half
        from circuits.prompts.dataset import load_prompts

        prompts = load_prompts(self.prompts, model, limit=self.examples)
        if self.test is not None:
            return prompts, load_prompts(self.test, model, limit=self.examples)
        return hold_out_half(prompts)
