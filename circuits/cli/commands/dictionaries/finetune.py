"""`sfc finetune`: autoencoders that exist already, tuned together while all of them stand in the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from circuits.cli.options import Common, HasModel, HasSites, HasText, Output, Overwrites
from sae._files import read_json
from sae._run.contents import RUN_CONFIG_FILE
from sae._run.locks import lock
from sae.errors import UserError
from sae.training.config import FinetuneConfig


@dataclass(frozen=True, kw_only=True)
class FinetuneCommand(Common, Overwrites, HasSites, HasText, HasModel):
    """Fine-tune autoencoders while all of them are spliced into the model, so that it predicts well with them."""

    saes: str
    """Autoencoders to begin with: a run folder, or any other that can be read; they stay as they are."""
    out: Path
    """New run folder; autoencoders go to saes/SITE."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same options."""
    config: FinetuneConfig = field(default_factory=FinetuneConfig)

    def run(self) -> Output:
        from circuits.cli.common import absolute_path, load_checked_saes, load_model
        from sae.model.sites import select_sites
        from sae.training.finetuning import finetune_saes
        from sae.training.run_folder import check_run_folder

        source = Path(self.saes)
        run = source.parent if source.name == "saes" else source
        if source.exists() and self.out.resolve() == run.resolve():
            raise UserError(f"out and saes are the same folder, {str(self.out)!r}: give another one, the trained stay")
        with lock(self.out):
            check_run_folder(self.out, "finetune", resume=self.resume, overwrite=self.overwrite)
        model = load_model(self.model, self, saes=self.saes)
        sites = None if self.sites == "all" else list(select_sites(self.sites, model.sites))
        saes = load_checked_saes(model, self.saes, sites=sites)
        finetune_saes(
            model,
            saes,
            self.text,
            config=self.config,
            out=self.out,
            origin=absolute_path(self.saes),
            resume=self.resume,
            overwrite=self.overwrite,
            progress=not self.quiet,
        )
        return Output("\n".join(finetuned_lines(self.out)), {"out": str(self.out), **progress_of(self.out)})


class _Predictions(TypedDict):
    """How well the model predicts with all autoencoders spliced in."""

    ce: float | None
    kl: float | None
    tokens: int


class _Finetuned(TypedDict, total=False):
    """The record that a finished fine-tuning leaves; older runs have none."""

    before: _Predictions
    after: _Predictions


class _Recorded(TypedDict):
    """The entry of a run's `config.json` that is read."""

    finetune: _Finetuned


def progress_of(run: Path) -> dict[str, Any]:
    """The first and the last lines of a fine-tuning log, one a site, and the predictions before and after."""
    from sae.training.run_folder import read_log

    lines = read_log(run / "saes" / "finetuning.jsonl")
    measured = dict(read_json(run / RUN_CONFIG_FILE, _Recorded)["finetune"])
    if not lines:
        return measured | {"first": [], "last": []}
    return measured | {
        name: [line for line in lines if line["step"] == lines[row]["step"]]
        for name, row in (("first", 0), ("last", -1))
    }


def finetuned_lines(run: Path) -> list[str]:
    """The change of each site, and of the predictions, from the first line of the log to the last."""
    progress = progress_of(run)
    rows = [
        f"  {before['site']:<9} explained variance {before['explained_variance']:.3f} -> "
        f"{after['explained_variance']:.3f}  L0 {before['l0']:.1f} -> {after['l0']:.1f}"
        for before, after in zip(progress["first"], progress["last"], strict=True)
    ]
    if not progress["last"]:
        return [f"wrote {run / 'saes'}"]
    name = "kl" if "kl" in progress["last"][0] else "ce"
    before, after = (progress.get(when, {}).get(name) for when in ("before", "after"))
    if before is not None and after is not None:
        rows.append(f"all sites spliced: {name} {before:.3f} -> {after:.3f} nats")
    return [*rows, f"wrote {run / 'saes'}"]
