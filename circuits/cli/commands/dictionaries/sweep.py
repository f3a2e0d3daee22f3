"""`sfc sweep`: a grid of dictionaries from one pass over the text, and what each is worth on held-out text."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tyro

from circuits.cli.commands.dictionaries.cache import open_cache
from circuits.cli.options import Common, HasSites, HasTextOrCache, Output, Overwrites, need
from circuits.cli.results import write_with_table
from sae._options import ContextLength, TokenCount
from sae._run.locks import lock
from sae.data.text import TextSource
from sae.errors import UserError, unknown
from sae.training.config import ARCHITECTURE_NAMES, ArchitectureName, TrainConfig

if TYPE_CHECKING:
    import pandas as pd

    from sae.data.cache import CachedModel
    from sae.evaluation.sweep import SweepResults
    from sae.model.language_model import LanguageModel
    from sae.training.sweep import Sweep

RESULTS_FILE = "sweep.json"
TABLE_FILE = "sweep.txt"
Entry = TypeVar("Entry")


@dataclass(frozen=True)
class SharedConfig(TrainConfig):
    """Training options that all dictionaries of a sweep have in common; the rest is the grid."""

    architecture: tyro.conf.Suppress[tyro.conf.Fixed[ArchitectureName]] = "topk"
    features: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 1024
    k: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 1
    seed: tyro.conf.Suppress[tyro.conf.Fixed[int]] = 0


@dataclass(frozen=True, kw_only=True)
class SweepCommand(Common, Overwrites, HasSites, HasTextOrCache):
    """Train a grid of autoencoders at every chosen site, all from one forward pass of the model over the text, and plot
    how fidelity depends on sparsity on held-out text; scaling laws say how it depends on width, sparsity and tokens.
    """

    out: Path
    """Folder; a dictionary goes to NAME/saes/SITE, and NAME is what other commands take as --saes."""
    architectures: str = "topk"
    """Architectures, such as topk,batchtopk,jumprelu."""
    features: str = "1024"
    """Numbers of features, such as 512,1024."""
    k: str = "32"
    """Active features a token, such as 8,16,32."""
    seeds: str = "0"
    """Seeds, such as 0,1."""
    eval_text: str | None = None
    """Held-out text to measure on; by default what comes in the text after the documents trained on."""
    eval_tokens: TokenCount = 50_000
    """Tokens measured."""
    eval_context_length: ContextLength = 128
    """Longest context measured, in tokens; what comes after it in a text is not read."""
    beside: str | None = None
    """Finished sweeps with other --tokens and the same --eval-text, several between commas, whose dictionaries join the
    scaling laws.
    """
    resume: bool = False
    """Go on with an interrupted sweep, or add to a finished one; nothing is trained or measured twice."""
    config: SharedConfig = field(default_factory=SharedConfig)

    def run(self) -> Output:
        with lock(self.out):
            return self._run()

    def _run(self) -> Output:
        from circuits.cli.common import load_model
        from sae.evaluation.sweep import HeldOut, evaluate_sweep

        text = None if self.eval_text is None else TextSource.of(self.eval_text)
        trained, source, name = self._train(text)
        model = load_model(name, self)
        results = evaluate_sweep(
            model,
            trained,
            HeldOut.of(trained, source, text),
            tokens=self.eval_tokens,
            context=self.eval_context_length,
            progress=not self.quiet,
            overwrite=self.overwrite,
        )
        results, rows = self._with_laws(results)
        drawn = self._draw(results, rows)
        tables = [results.summary(), results.text(), *filter(None, [results.laws_text()])]
        write_with_table(self.out / RESULTS_FILE, results.to_dict(), "\n\n".join(tables) + "\n")
        files = f"{self.out / RESULTS_FILE}, {self.out / TABLE_FILE} and {drawn}"
        wrote = f"wrote {files}; a dictionary is --saes {self.out / next(iter(trained.configs))}, and so on"
        laws = f"\n\n{results.laws_text()}" if results.laws else ""
        return Output(f"{results.summary()}{laws}\n{wrote}", {**results.to_dict(), "out": str(self.out)})

    def _train(self, eval_text: TextSource | None) -> tuple[Sweep, TextSource, str]:
        """The dictionaries, the text they learned from, and the name of the model."""
        from circuits.cli.common import load_model
        from sae.model.sites import select_sites
        from sae.training.run_folder import check_sweep_folder
        from sae.training.sweep import grid, sweep

        configs = grid(
            TrainConfig(**{key: value for key, value in asdict(self.config).items() if key not in GRID}),
            architectures=[_architecture(name) for name in _entries("architectures", self.architectures, str)],
            features=_entries("features", self.features, int),
            k=_entries("k", self.k, int),
            seeds=_entries("seeds", self.seeds, int),
        )
        check_sweep_folder(self.out, configs)
        options: dict[str, Any] = {
            "sites": self.sites,
            "out": self.out,
            "resume": self.resume,
            "overwrite": self.overwrite,
            "progress": not self.quiet,
        }
        if self.cache is not None:
            cache = open_cache(self.cache, model=self.model, text=self.text, sites=self.sites, device=self.device)
            self._check_measured(configs, cache.model, eval_text or cache.text)
            self._estimate(configs, list(cache.widths.values()))
            trained = sweep(cache.model, cache.text, configs, activations=cache, **options)
            return trained, cache.text, self.model or cache.manifest.model
        name, source = need(self.model, "model"), TextSource.of(need(self.text, "text"))
        model = load_model(name, self)
        self._check_measured(configs, model, eval_text or source)
        self._estimate(configs, [model.widths[site] for site in select_sites(self.sites, model.sites)])
        return sweep(model, source, configs, **options), source, name

    def _check_measured(
        self, configs: dict[str, TrainConfig], model: LanguageModel | CachedModel, text: TextSource
    ) -> None:
        """UserError, before the work, where a dictionary here or of a sweep beside was measured with other settings."""
        from sae.data.batches import context_of
        from sae.data.cache import CachedModel
        from sae.evaluation.sweep import check_measured, evaluation_settings, measured_rows

        asked = self.eval_context_length
        context = asked if isinstance(model, CachedModel) else context_of(model, asked)
        settings = evaluation_settings(model, text, tokens=self.eval_tokens, context=context)
        if isinstance(model, CachedModel):  # it may be of a model that takes less
            del settings["context"]
        for folder in self._beside():
            measured_rows(folder, settings)
        if not self.overwrite:
            check_measured(self.out, configs, settings)

    def _beside(self) -> list[str]:
        return [folder.strip() for folder in (self.beside or "").split(",") if folder.strip()]

    def _estimate(self, configs: dict[str, TrainConfig], widths: list[int]) -> None:
        """Say how much is trained, before the work."""
        from sae.training.sweep import training_bytes

        if not self.quiet:
            size = training_bytes(configs.values(), widths) / 1e9
            sys.stderr.write(
                f"{len(configs)} dictionaries at {len(widths)} sites: {size:.2f} GB of weights, gradients and moments\n"
            )

    def _with_laws(self, results: SweepResults) -> tuple[SweepResults, pd.DataFrame]:
        """The results with the laws that these and other sweeps' dictionaries follow, and all of these, a row each."""
        import pandas as pd

        from sae.architectures import architecture
        from sae.evaluation.scaling import fit_laws
        from sae.evaluation.sweep import measured_rows

        rows = list(results.rows)
        for folder in self._beside():
            rows += measured_rows(folder, {})
        frame = pd.DataFrame([asdict(row) for row in rows])
        learned = frame[[architecture(name).trained for name in frame["architecture"]]]
        return replace(results, laws=fit_laws(learned)), learned

    def _draw(self, results: SweepResults, rows: pd.DataFrame) -> Path:
        """Both measures over all sites, a plot a site, and the scaling laws of each architecture."""
        from sae.evaluation.sweep_plots import METRICS, plot_laws, plot_site, plot_sites

        folder = self.out / "plots"
        for name in dict.fromkeys(law.architecture for law in results.laws):
            plot_laws(rows, results.laws, name, folder / f"scaling-{name}.svg")
        for metric in METRICS:
            plot_sites(results, metric, folder / f"{metric}.svg")
        for site in results.sites:
            plot_site(results, site, folder / f"{site}.svg")
        return folder


GRID = ("architecture", "features", "k", "seed")


def _entries(option: str, text: str, kind: Callable[[str], Entry]) -> list[Entry]:
    """`"8,16"` -> [8, 16], without repetitions."""
    try:
        entries = list(dict.fromkeys(kind(word.strip()) for word in text.split(",") if word.strip()))
    except ValueError:
        entries = []
    if not entries:
        example = {"architectures": "topk,batchtopk", "features": "512,1024", "k": "8,16,32", "seeds": "0,1"}[option]
        raise UserError(f"{option} is {text!r}: expected values separated by commas, such as {example}")
    return entries


def _architecture(name: str) -> ArchitectureName:
    for architecture in ARCHITECTURE_NAMES:
        if name == architecture:
            return architecture
    raise unknown("architecture", name, ARCHITECTURE_NAMES)
