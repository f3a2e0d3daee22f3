"""`sfc evaluate`: how good the autoencoders of a run are, each alone and all of them together in the model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from circuits.cli.options import Common, HasModel, HasSaes, HasText, Named, Output
from circuits.cli.results import ResultFiles, made_with
from sae._options import BatchSize, ContextLength, TokenCount
from sae._run.contents import check_complete
from sae._run.locks import lock
from sae.data.text import TextSource
from sae.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(Common, Named, HasText, HasSaes, HasModel):
    """Measure the autoencoders of a run on text: each alone in the model, and all of them spliced in together."""

    tokens: TokenCount = 50_000
    """Tokens measured."""
    context_length: ContextLength = 128
    """Longest context, in tokens, or less if the model takes less; what comes after it in a text is not read."""
    batch_size: BatchSize = 16
    """Texts that go through the model at once."""
    skip_errors: bool = False
    """Leave out what each site's error matters while all others are dropped, one forward pass a site and batch."""
    out: Path | None = None
    """Folder for evaluation.json, .txt and .svg; that of the autoencoders by default."""

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

        suffixes = (".json", ".txt", ".svg")
        if folder is not None:
            ResultFiles(folder, "evaluation", self, {}, suffixes).check_foreign()
        model = load_model(self.model, self, saes=self.saes)
        saes, source = load_checked_saes(model, self.saes), TextSource.of(self.text)
        facts = {"model_fingerprint": model.fingerprint, "saes_fingerprint": saes_fingerprint(saes)}
        files = ResultFiles(folder or Path(), "evaluation", self, made_with(self, **facts), suffixes)
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
        if folder is not None:
            data = files.write(data, table=text + "\n")
            picture = plot_evaluation(result, files.path(".svg"))
            text += f"\nwrote {files.path('.json')}, {files.path('.txt').name} and {picture.name}"
        return Output(text, data)


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
