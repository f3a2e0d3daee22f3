"""`sfc train`: autoencoders at the sites of a model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from circuits.cli.commands.dictionaries.cache import open_cache
from circuits.cli.commands.dictionaries.finetune import finetuned_lines, progress_of
from circuits.cli.options import Common, HasSites, HasTextOrCache, Output, Overwrites, SharesWork, need
from sae._options import TokenCount
from sae._run.locks import lock
from sae._run.processes import current
from sae.errors import UserError
from sae.training.config import FinetuneConfig, TrainConfig

TRAINED = "trained"
"""Folder inside the run that keeps the autoencoders as they were before fine-tuning."""
FINETUNED = 5
"""Tokens of training to one of fine-tuning, where it is not said."""


@dataclass(frozen=True, kw_only=True)
class TrainCommand(Common, Overwrites, SharesWork, HasSites, HasTextOrCache):
    """Train a sparse autoencoder at every chosen site, all from one forward pass of the model over the text."""

    out: Path
    """Run folder; autoencoders go to saes/SITE."""
    resume: bool = False
    """Go on from the last checkpoint of an interrupted run with the same options."""
    estimate: bool = False
    """Make a few steps, print how much time, memory and disk space all of it takes, and stop; nothing is written."""
    finetune: Literal["none", "kl", "ce"] = "none"
    """Fine-tune afterwards with all autoencoders spliced in, for the model's predictions (kl) or the text (ce)."""
    finetune_tokens: TokenCount | None = None
    """Tokens to fine-tune on, beside those of training; a fifth of these by default. `sfc finetune` has more options.
    """
    parallel: Literal["sites", "data", "features"] | None = None
    """What several processes share out: sites, each training some of them, to the same bits as one process; data, each
    training all on its share of every batch, the same up to rounding, but not batchtopk, matryoshka, resampling or a
    cache; or features, each having a block of those of every topk, relu, relu_unit or jumprelu autoencoder, for widths
    that fit no device. Sites by default where there is one for each process.
    """
    config: TrainConfig = field(default_factory=TrainConfig)

    def run(self) -> Output:
        from sae.training.run_folder import check_run_folder, discard_run, is_discarding

        if self.estimate:
            return self._estimate()
        if self.finetune == "none":
            if self.finetune_tokens is not None:
                raise UserError(f"finetune-tokens is {self.finetune_tokens}: there is none without --finetune kl")
            return self._train(self.out)
        need(self.model, "model")
        text = need(self.text, "text")
        with lock(self.out):
            check_run_folder(self.out, "finetune", resume=self.resume, overwrite=self.overwrite)
            if is_discarding(self.out) or not self.resume:
                discard_run(self.out)
            trained = self._train(self.out / TRAINED)
            return self._finetune(trained, text)

    def for_one_process(self) -> str | None:
        return None if self.finetune == "none" else f"finetune is {self.finetune!r}"

    def _estimate(self) -> Output:
        from circuits.cli.common import load_model
        from sae.training.cost import estimate_training

        if self.cache is not None:
            cache = open_cache(self.cache, model=self.model, text=self.text, sites=self.sites, device=self.device)
            estimate = estimate_training(
                cache.model, cache.text, sites=self.sites, config=self.config, activations=cache, parallel=self.parallel
            )
        else:
            name, text = need(self.model, "model"), need(self.text, "text")
            estimate = estimate_training(
                load_model(name, self), text, sites=self.sites, config=self.config, parallel=self.parallel
            )
        return Output(estimate.text(), {"estimate": estimate.to_dict()})

    def _train(self, out: Path) -> Output:
        from circuits.cli.common import load_model
        from sae.training.train import train_saes

        options: dict[str, Any] = {
            "sites": self.sites,
            "config": self.config,
            "out": out,
            "resume": self.resume,
            "overwrite": self.overwrite,
            "progress": not self.quiet,
            "parallel": self.parallel,
        }
        if self.cache is not None:
            cache = open_cache(self.cache, model=self.model, text=self.text, sites=self.sites, device=self.device)
            train_saes(cache.model, cache.text, activations=cache, **options)
        else:
            name, text = need(self.model, "model"), need(self.text, "text")
            train_saes(load_model(name, self), text, **options)
        if not current().is_first:
            return Output("", {})
        last = last_lines(out / "saes" / "training.jsonl")
        rows = [
            f"  {line['site']:<9} explained variance {_shown(line, 'explained_variance', '.3f')}  "
            f"L0 {_shown(line, 'l0', '6.1f')}  dead {_shown(line, 'dead', '.2f')}"
            for line in last
        ]
        return Output("\n".join([*rows, f"wrote {out / 'saes'}"]), {"out": str(out), "sites": last})

    def _finetune(self, trained: Output, text: str) -> Output:
        from circuits.cli.common import load_checked_saes, load_model
        from sae.training.finetuning import finetune_saes

        training = self.config
        config = FinetuneConfig(
            loss="ce" if self.finetune == "ce" else "kl",
            tokens=self.finetune_tokens or max(1, training.tokens // FINETUNED),
            context_length=training.context_length,
            packed=training.packed,
            exclude_special=training.exclude_special,
        )
        model = load_model(need(self.model, "model"), self)
        finetune_saes(
            model,
            load_checked_saes(model, self.out / TRAINED),
            text,
            config=config,
            out=self.out,
            origin=TRAINED,
            resume=self.resume,
            overwrite=self.overwrite or not self.resume,
            progress=not self.quiet,
        )
        rows = "\n".join([trained.text, *finetuned_lines(self.out)])
        return Output(rows, trained.data | {"out": str(self.out), "finetuning": progress_of(self.out)})


def last_lines(log: Path) -> list[dict[str, Any]]:
    """The last line of each site in a training log."""
    from sae.training.run_folder import read_log

    return list({line["site"]: line for line in read_log(log)}.values())


def _shown(line: dict[str, Any], key: str, digits: str) -> str:
    """A number of a log line, "-" where it is undefined."""
    value = line.get(key)
    return format(value, digits) if isinstance(value, int | float) else "-"
