"""`sfc evaluate`: how good the autoencoders of a run are, each alone and all of them together in the model; with
`--suite` on tasks, with `--other` beside another seed.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.benchmark.options import SuiteOptions
from circuits.cli.options import Common, HasModel, HasSaes, HasText, Named, Output
from circuits.cli.results import ResultFiles, made_with
from sae._options import BatchSize, ContextLength, TokenCount
from sae._run.contents import check_complete
from sae._run.locks import lock
from sae.data.text import TextSource
from sae.errors import UserError

if TYPE_CHECKING:
    from circuits.benchmark.results import SuiteReport
    from sae.model.language_model import LanguageModel
    from sae.saes import SAEs


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Common, Named, HasText, HasSaes, HasModel):
    """Measure the autoencoders of a run on text: each alone in the model, and all of them spliced in together. With
    --suite, what their features are worth on labelled texts: sparse probing, removal of spurious correlations (SCR),
    targeted perturbation (TPP) and absorption, as in SAEBench.
    """

    tokens: TokenCount = 50_000
    """Tokens measured."""
    context_length: ContextLength = 128
    """Longest context, in tokens, or less if the model takes less; what comes after it in a text is not read."""
    batch_size: BatchSize = 16
    """Texts that go through the model at once."""
    skip_errors: bool = False
    """Leave out what each site's error matters while all others are dropped, one forward pass a site and batch."""
    suite: str | None = None
    """Labelled texts to try the features on: a file (JSON lines or a table, text and label), a folder of such files,
    sae-probes or sae-probes:TAG,TAG for the data of that package, or the folder that holds them.
    """
    other: str | None = None
    """Autoencoders of other seeds at the same sites, several between commas, for the stability of features."""
    out: Path | None = None
    """Folder for evaluation.json, .txt, .svg and .suite.svg; that of the autoencoders by default."""
    options: SuiteOptions = field(default_factory=SuiteOptions)

    def run(self) -> Output:
        folder = self.out or _folder_of(self.saes)
        with nullcontext() if folder is None else lock(folder, shared=True):
            return self._run(folder)

    def _run(self, folder: Path | None) -> Output:
        from circuits.cli.common import load_checked_saes, load_model
        from sae._progress import ProgressBar
        from sae.data.batches import context_of
        from sae.evaluation.evaluate import evaluate_saes
        from sae.evaluation.plots import plot_evaluation
        from sae.evaluation.sweep import evaluation_settings
        from sae.saes import saes_fingerprint

        suffixes = (".json", ".txt", ".svg", ".suite.svg")
        if folder is not None:
            ResultFiles(folder, "evaluation", self, {}, suffixes).check_foreign()
        model = load_model(self.model, self, saes=self.saes)
        saes, source = load_checked_saes(model, self.saes), TextSource.of(self.text)
        others = self._others(model)
        facts = {"model_fingerprint": model.fingerprint, "saes_fingerprint": saes_fingerprint(saes)}
        files = ResultFiles(folder or Path(), "evaluation", self, self._made_with(**facts), suffixes)
        if folder is not None:
            files.check()
        context = context_of(model, self.context_length)
        with ProgressBar(total=self.tokens, desc="evaluate", unit="token", disable=self.quiet) as bar:
            result = evaluate_saes(
                model,
                saes,
                source.read(),
                max_tokens=self.tokens,
                context=context,
                batch_size=self.batch_size,
                errors=not self.skip_errors,
                progress=bar.update,
            )
        settings = evaluation_settings(model, source, tokens=self.tokens, context=context)
        data = {**result.to_dict(), "measured_on": settings}
        text = result.text()
        report = self._suite(model, saes, others, source, context)
        if report is not None:
            data["suite"] = report.to_dict()
            text += f"\n\n{report.text()}"
        if folder is not None:
            data = files.write(data, table=text + "\n")
            written = [plot_evaluation(result, files.path(".svg"))]
            if report is not None:
                from circuits.benchmark.plots import plot_suite

                written.append(plot_suite(report, files.path(".suite.svg")))
            names = [files.path(".txt").name, *(path.name for path in written)]
            text += f"\nwrote {files.path('.json')}, {', '.join(names[:-1])} and {names[-1]}"
        return Output(text, data)

    def _made_with(self, **facts: str) -> dict[str, Any]:
        """All that decides the result: of tasks no more than their texts and options where there are any."""
        made = made_with(self, **facts)
        for name in ("suite", "other"):
            if made[name] is None:
                del made[name]
        if self.suite is None:
            del made["options"]
        return made

    def _others(self, model: LanguageModel) -> dict[str, SAEs]:
        """Autoencoders of other seeds, by their folder."""
        from circuits.cli.common import load_checked_saes

        names = [name.strip() for name in (self.other or "").split(",") if name.strip()]
        return {name: load_checked_saes(model, name) for name in names}

    def _suite(
        self, model: LanguageModel, saes: SAEs, others: dict[str, SAEs], source: TextSource, context: int
    ) -> SuiteReport | None:
        """The tasks that were asked for."""
        if self.suite is None and not others:
            return None
        from circuits.benchmark.results import SuiteReport
        from circuits.benchmark.suite import evaluate_suite
        from sae._progress import ProgressBar
        from sae.evaluation.stability import feature_stability

        report = SuiteReport()
        if self.suite is not None:
            with ProgressBar(desc="suite", unit="reading", disable=self.quiet) as bar:

                def say(what: str) -> None:
                    bar.set_postfix_str(what)
                    bar.update(1)

                report = evaluate_suite(model, saes, self.suite, self.options, context=context, progress=say)
        if others:
            stability = feature_stability(
                model, saes, others, source.read(), max_tokens=self.tokens, batch_size=self.batch_size, context=context
            )
            report.stability.extend(stability)
        return report


def _folder_of(saes: str) -> Path | None:
    """The folder of a run that the autoencoders are in, None where they are the hub's; UserError for another
    project's.
    """
    from sae.formats.locate import sae_folders

    folder = Path(saes)
    if not folder.is_dir():
        return None
    if not sae_folders(folder):
        check_complete(folder)
        raise UserError(
            f"{saes!r} is no run folder of sfc, so that nothing is written there: give --out for the results"
        )
    return folder / "saes" if (folder / "saes").is_dir() else folder
