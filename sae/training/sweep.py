"""Sweeps: a grid of architectures, widths, sparsities and seeds at every site, from one forward pass a batch of text.

1. `grid` makes a `TrainConfig` for each combination, named by what varies ("batchtopk-1024-k32-seed0");
2. `sweep` trains all of them at all sites on the same activations and leaves each in its own run folder
   `out`/NAME/saes/SITE/, which everything that takes a run folder reads. A dictionary is the same bits as `train` with
   its config gives, for each seed has its own order of the activations.

Options of the data (tokens, batch, context, buffer) must be equal in all; one optimizer step moves them all. With
`resume`, dictionaries that are in their folder already are not trained again, and a larger grid trains what is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from sae._files import atomic_write, check_type
from sae._run.contents import RUN_CONFIG_FILE
from sae._run.locks import lock
from sae.architectures import architecture
from sae.data.activations import TextRead
from sae.data.cache import CachedActivations, CachedModel
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.training.config import ArchitectureName, TrainConfig, with_contexts_of
from sae.training.run_folder import RunFolder, read_entry, read_log, run_settings
from sae.training.trainer import Trainer, begin, export, open_activations

SHARED = (
    "tokens", "batch_size", "context_length", "packed", "exclude_special", "buffer_tokens", "log_steps", "checkpoints",
    "kind", "read", "autocast",
)  # fmt: skip
"""Options that all configs of a sweep have in common."""
BYTES_PER_WEIGHT = 16
"""Weight, gradient and two moments of Adam in float32."""


@dataclass(frozen=True)
class Sweep:
    """The dictionaries that `sweep` trained."""

    out: Path
    """Its folder."""
    configs: dict[str, TrainConfig]
    """Training options by name; all that were ever trained in this folder."""
    sites: tuple[Site, ...]
    """Sites that each config has a dictionary at."""
    read: TextRead
    """How much of the text was read; what comes after is held out."""

    @classmethod
    def load(cls, out: str | Path) -> Sweep:
        """The sweep in a folder."""
        out = Path(out)
        entry = read_entry(out, "sweep")
        if entry is None or not entry.complete:
            raise UserError(f"no complete sweep in {str(out)!r}: run it again with --resume")
        where = f"{out / RUN_CONFIG_FILE}, sweep"
        configs = {name: check_type(options, TrainConfig, where) for name, options in entry.config.items()}
        runs = {name: read_entry(out / name, "train") for name in configs}
        if missing := [name for name, run in runs.items() if run is None or not run.complete]:
            raise UserError(f"{str(out / missing[0])!r} holds no complete run: run the sweep again with --resume")
        reads = [check_type(run.read, TextRead, out / name / RUN_CONFIG_FILE) for name, run in runs.items() if run]
        read = max(reads, key=lambda read: (read.is_all, read.documents))
        return cls(out, configs, tuple(map(Site.parse, entry.sites)), read)

    def run(self, name: str) -> Path:
        """The run folder of a config."""
        return self.out / name


def grid(
    base: TrainConfig | None = None,
    *,
    architectures: Sequence[ArchitectureName] = ("topk",),
    features: Sequence[int] = (1024,),
    k: Sequence[int] = (32,),
    seeds: Sequence[int] = (0,),
) -> dict[str, TrainConfig]:
    """Every combination, by name; all other options from `base`. Architectures that are not trained appear once."""
    base = base or TrainConfig()
    configs = {}
    for name, width, active, seed in product(architectures, features, k, seeds):
        config = replace(base, architecture=name, features=width, k=active, seed=seed)
        trained = architecture(name).trained
        configs[f"{name}-{width}-k{active}-seed{seed}" if trained else name] = config
    return configs


def training_bytes(configs: Iterable[TrainConfig], widths: Iterable[int]) -> int:
    """Memory of weights, gradients and Adam's moments of all dictionaries of a sweep."""
    trained = [config for config in configs if architecture(config.architecture).trained]
    return sum(BYTES_PER_WEIGHT * (2 * width + 1) * config.features for config in trained for width in widths)


def sweep(
    model: LanguageModel | CachedModel,
    texts: str | Path | Iterable[str] | TextSource,
    configs: Mapping[str, TrainConfig],
    *,
    sites: str | Sequence[str | Site] = "all",
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    activations: CachedActivations | None = None,
) -> Sweep:
    """Trains every config at every site from the same activations; with a cache the model is not needed (`train`)."""
    source, first, out = TextSource.of(texts), _shared(configs), Path(out)
    chosen = tuple(select_sites(sites, model.sites))
    if activations is not None:
        configs = {name: with_contexts_of(activations, config) for name, config in configs.items()}
        first = with_contexts_of(activations, first)
    identity = None if activations is None else activations.identity
    sweep_folder = RunFolder(out, "sweep", run_settings(model, source, chosen, configs, cache=identity))
    runs = {
        name: RunFolder(out / name, "train", run_settings(model, source, chosen, config, cache=identity))
        for name, config in configs.items()
    }
    with lock(out):
        if resume and sweep_folder.is_replacing():
            sweep_folder.start(resume=True, overwrite=False)
        waiting = [name for name, run in runs.items() if not (resume and run.finished())]
        if waiting:
            rows = open_activations(model, source, chosen, first, cache=activations)
            sweep_folder.start(resume=resume, overwrite=overwrite)
            for name in waiting:
                runs[name].start(resume=resume, overwrite=overwrite)
            saes = [begin(f"{name}/{site}", site, rows, configs[name], model) for name in waiting for site in chosen]
            Trainer(saes, rows, first, sweep_folder, progress=progress).run()
            for sae in saes:
                name = sae.name.removesuffix(f"/{sae.site}")
                runs[name].save({sae.site: export(sae, model, rows)})
            _split_log(sweep_folder.log_path, {name: runs[name].path for name in waiting})
            for name in waiting:
                runs[name].finish(read=asdict(rows.text_read()))
        sweep_folder.finish()
        sweep_folder.log_path.unlink(missing_ok=True)
    return Sweep.load(out)


def _split_log(log: Path, runs: Mapping[str, Path]) -> None:
    """Gives each run folder its lines of the common log, as `train` leaves them."""
    lines: dict[str, list[str]] = {name: [] for name in runs}
    for entry in read_log(log):
        name, _, site = entry["site"].rpartition("/")
        if name in lines:
            lines[name].append(json.dumps({**entry, "site": site}) + "\n")
    for name, run_lines in lines.items():
        with atomic_write(runs[name] / "saes" / "training.jsonl") as temporary:
            temporary.write_text("".join(run_lines), encoding="utf-8")


def _shared(configs: Mapping[str, TrainConfig]) -> TrainConfig:
    """Any of the configs, after a check that they agree in what they share."""
    if not configs:
        raise UserError("a sweep of no configs: give at least one")
    first_name, first = next(iter(configs.items()))
    for name, config in configs.items():
        for option in SHARED:
            value, first_value = getattr(config, option), getattr(first, option)
            if value != first_value:
                raise UserError(
                    f"{option} is {value} in {name!r} and {first_value} in {first_name!r}: a sweep has only one"
                )
    return first
