"""The folder of a training run: what it was begun with, whether it may go on, whether it ended.

`config.json` holds the settings under the name of the command, and `complete` beside them: false from the start on,
true once everything is on disk. So a run that replaces an older one is never taken for it, whenever it was killed.
"""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sae._files import check_type, parse_json, prepare_folder, write_json
from sae._run.contents import CHECKPOINTS as CHECKPOINT_FILES
from sae._run.contents import (
    MADE_WITH_SAES,
    MAKERS,
    RUN,
    RUN_CONFIG_FILE,
    SAE,
    TRAINED,
    Layout,
    check_contents,
    check_run_config,
    clean,
    read_run_config,
    remove,
    sweep_layout,
    visible,
)
from sae.autoencoder import SparseAutoencoder
from sae.data.cache import CachedModel
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.checks import precision_of
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import SAEs
from sae.training.config import TrainConfig

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
LOGS = {"train": "saes/training.jsonl", "finetune": "saes/finetuning.jsonl", "sweep": "training.jsonl"}
"""Training logs, by the command that writes them."""
COMPARED = (
    "model_fingerprint", "text_fingerprint", "cache", "dtype", "quantize", "sites", "site_paths", "saes_fingerprint",
    "config",
)  # fmt: skip
"""Settings that must be the same when a run goes on."""
NEWER = ("dtype", "saes_fingerprint")
"""Those of them that runs of earlier versions do not have."""
SHOWN_AS = {"model_fingerprint": "model", "text_fingerprint": "text"}
"""Settings that a person knows by another entry."""


def run_settings(
    model: LanguageModel | CachedModel,
    source: TextSource,
    sites: Sequence[Site],
    config: TrainConfig | Mapping[str, TrainConfig],
    *,
    cache: str | None = None,
) -> dict[str, Any]:
    """Settings that the result of a run depends on; `cache` is the identity of an activation cache that it reads."""
    configs = asdict(config) if isinstance(config, TrainConfig) else {n: asdict(c) for n, c in config.items()}
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "text": source.name,
        "text_fingerprint": source.fingerprint,
        "cache": cache,
        **({} if isinstance(model, CachedModel) else precision_of(model)),
        "sites": [site.name for site in sites],
        "site_paths": {site.name: path for site, path in model.moved_sites.items() if site in sites},
        "device": str(model.device),
        "config": configs,
    }


@dataclass(frozen=True)
class RunEntry:
    """The entries of a run in `config.json` that are read again."""

    sites: list[str]
    """Its sites."""
    config: dict[str, Any]
    """Its options; of a sweep those of each dictionary."""
    complete: bool = False
    """Whether everything is on disk."""
    replaced: list[str] | None = None
    """Sites, or of a sweep dictionaries, of the run it replaces, while they are being removed."""
    model: str | None = None
    model_fingerprint: str | None = None
    text: str | None = None
    text_fingerprint: str | None = None
    cache: str | None = None
    dtype: str | None = None
    quantize: str | None = None
    site_paths: dict[str, str] | None = None
    saes_fingerprint: str | None = None
    read: dict[str, Any] | None = None
    """How much of the text it read."""


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path
    """The folder."""
    command: str
    """Name under which its settings are written: train, finetune or sweep."""
    settings: dict[str, Any]
    """Settings that its result depends on (`run_settings`)."""

    @property
    def checkpoints(self) -> Path:
        """Folder of its checkpoints while it runs."""
        return self.path / CHECKPOINTS

    @property
    def log_path(self) -> Path:
        """File of its training log."""
        return self.path / LOGS[self.command]

    def load(self, device: torch.device) -> SAEs:
        """The autoencoders of a run that ended before."""
        log.info("the run in %s is complete; nothing to resume", self.path)
        folders = {Site.parse(name): self.path / "saes" / name for name in self.settings["sites"]}
        return SAEs({site: SparseAutoencoder.load(folder, device=device) for site, folder in folders.items()})

    def save(self, saes: Mapping[Site, SparseAutoencoder]) -> None:
        """Write the autoencoders of the run."""
        for site, sae in saes.items():
            sae.save(self.path / "saes" / site.name, overwrite=True)  # `start` has looked at what is there

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, remove what an earlier run of it left there, and write the settings.

        A folder that holds anything but such a run is refused. When resuming, one is refused in which no run was begun
        or a run with other settings.
        """
        before = self.recorded()
        if resume and before is not None:
            self._check_same(before, but=("config",) if before.complete else ())
        goes_on = before if resume else None
        check_run_folder(
            self.path, self.command, resume=resume, overwrite=overwrite,
            layout=_layout_of_sweep(self.path, self.settings["config"]) if self.command == "sweep" else RUN,
        )  # fmt: skip
        if goes_on is None or goes_on.complete:
            replaced = self._replaced(before, resume=resume)
            self._write({**self._joined(goes_on), "complete": False, "replaced": replaced})
        else:
            replaced = goes_on.replaced or []
        if goes_on is None or goes_on.complete or goes_on.replaced is not None:
            self._remove_earlier(replaced)
            self._write({**self._joined(goes_on), "complete": False})
        clean(self.path)

    def finish(self, **results: Any) -> None:
        """Say that everything is on disk; `results` stand beside the settings."""
        self._write({**self._joined(self.recorded()), "complete": True, **results})
        self.tidy()

    def tidy(self) -> None:
        """Remove what only an interrupted run needs."""
        remove(self.checkpoints, CHECKPOINT_FILES)
        clean(self.path)

    def _joined(self, before: RunEntry | None) -> dict[str, Any]:
        """The settings; those of a sweep keep the configs of earlier ones in the same folder."""
        if self.command != "sweep" or before is None:
            return self.settings
        return {**self.settings, "config": {**before.config, **self.settings["config"]}}

    def is_replacing(self) -> bool:
        """Whether it was interrupted while it removed what an earlier run left."""
        before = self.recorded()
        return before is not None and before.replaced is not None

    def finished(self) -> bool:
        """Whether a run with these settings ended here; refuses a run with others."""
        before = self.recorded()
        if before is None or not before.complete:
            return False
        self._check_same(before)
        self.tidy()
        return True

    def recorded(self) -> RunEntry | None:
        """The settings in the folder, None where there are none of this command."""
        return read_entry(self.path, self.command)

    def _replaced(self, before: RunEntry | None, *, resume: bool) -> list[str]:
        """Names of what the run in the folder wrote, or was writing, and this one does not go on with."""
        if self.command == "sweep":
            names = set() if resume or before is None else {*before.config, *_replaced(before)}
            return sorted(names)
        return _recorded_sites(self.path)

    def _remove_earlier(self, names: Sequence[str]) -> None:
        """Removes checkpoints, logs, measurements and autoencoders of the run that was here before."""
        remove(self.checkpoints, CHECKPOINT_FILES)
        if self.command == "sweep":
            for name in names:
                remove(self.path / name, TRAINED)
            return
        remove(self.path / "saes", Layout(MADE_WITH_SAES, dict.fromkeys(names, SAE)))
        if self.command == "train":
            remove(self.path / "trained", TRAINED)

    def _write(self, entry: dict[str, Any]) -> None:
        """The settings and the versions; what commands left in the file that make no autoencoders stays."""
        entries: dict[str, Any] = read_run_config(self.path) or {"schema_version": 1}
        others = {key: value for key, value in entries.items() if key not in MAKERS}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        both = {**others, self.command: entry, "versions": {**others.get("versions", {}), **versions}}
        write_json(self.path / RUN_CONFIG_FILE, both)

    def _check_same(self, entry: RunEntry, *, but: Sequence[str] = ()) -> None:
        before = asdict(entry)
        for key in COMPARED:
            if key in but:
                continue
            then, now = before[key], json.loads(json.dumps(self.settings.get(key)))
            if key in NEWER and then is None:
                continue
            if (then or None) != (now or None):
                shown = SHOWN_AS.get(key, key)
                if shown != key and before.get(shown) != self.settings[shown]:
                    then, now = before.get(shown), self.settings[shown]
                elif shown != key:
                    then, now = f"{before.get(shown)} ({then})", f"{self.settings[shown]} as it is now ({now})"
                elif isinstance(then, dict) and isinstance(now, dict):
                    then, now = _differing(then, now)
                begun = f"the run in {str(self.path)!r} was begun with {shown} {then!r}"
                raise UserError(
                    f"{begun} and cannot be resumed with {now!r}: give the same options, another folder or --overwrite"
                )


def _layout_of_sweep(folder: Path, names: Iterable[str]) -> Layout:
    """The files that a sweep of these configs may find in its folder: its own, and those of the sweep before it."""
    before = read_entry(folder, "sweep")
    return sweep_layout([*names, *(before.config if before else ()), *_replaced(before)])


def check_sweep_folder(folder: Path, names: Iterable[str]) -> None:
    """UserError where the folder of a sweep of these configs holds anything else."""
    check_run_config(folder)
    check_contents(folder, _layout_of_sweep(folder, names))


def check_run_folder(folder: Path, command: str, *, resume: bool, overwrite: bool, layout: Layout = RUN) -> None:
    """Make a run's folder; UserError where it holds anything but a run that is to be replaced or resumed."""
    check_run_config(folder)
    check_contents(folder, layout)
    recorded = any(read_entry(folder, name) for name in MAKERS)
    ignored = {"trained", RUN_CONFIG_FILE} if command == "finetune" else set()
    there = [path.name for path in visible(folder) if path.name not in ignored]
    if resume and not overwrite and there and read_entry(folder, command) is None:
        raise UserError(
            f"no run of sfc {command} was begun in {str(folder)!r}, which holds {', '.join(there[:3])}: nothing can be "
            "resumed; give the folder of the run, or a new one"
        )
    prepare_folder(folder, overwrite=overwrite or resume)
    sites = set(_recorded_sites(folder))
    others = [path.name for path in visible(folder / "saes") if path.is_dir() and path.name not in sites]
    others += ["checkpoints"] if visible(folder / CHECKPOINTS) and not recorded else []
    if others:
        raise UserError(
            f"{str(folder)!r} holds {', '.join(others[:3])}, which its {RUN_CONFIG_FILE} does not name as of this run: "
            "nothing is deleted or overwritten; give another folder, or move them away"
        )


def discard_run(folder: Path) -> None:
    """Remove the autoencoders of a run folder, with checkpoints, logs and measurements; first of all they are marked
    as incomplete.
    """
    entries, sites = read_run_config(folder), _recorded_sites(folder)
    makers = {key: {**value, "complete": False, "replaced": sites} for key, value in entries.items() if key in MAKERS}
    if makers:
        write_json(folder / RUN_CONFIG_FILE, {**entries, **makers})
        remove(folder / CHECKPOINTS, CHECKPOINT_FILES)
        remove(folder / "saes", Layout(MADE_WITH_SAES, dict.fromkeys(sites, SAE)))
        write_json(folder / RUN_CONFIG_FILE, {key: value for key, value in entries.items() if key not in MAKERS})


def is_discarding(folder: Path) -> bool:
    """Whether `discard_run`, or the beginning of a run that replaces another one, was interrupted."""
    return any(_replaced(read_entry(folder, command)) for command in ("train", "finetune"))


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a training log, each of a site; damaged ones are left out with a warning."""
    lines = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            entry = parse_json(line.decode(), path, dict[str, Any])
        except (UserError, UnicodeDecodeError):
            entry = {}
        if isinstance(entry.get("site"), str) and isinstance(entry.get("step"), int):
            lines.append(entry)
        else:
            log.warning("%s: a damaged line is left out", path)
    return lines


def _recorded_sites(folder: Path) -> list[str]:
    """Sites of the autoencoders that the run in a folder wrote, or was writing."""
    entries = [read_entry(folder, command) for command in ("train", "finetune")]
    return sorted({site for entry in entries if entry for site in (*entry.sites, *_replaced(entry))})


def _replaced(entry: RunEntry | None) -> list[str]:
    return (entry.replaced if entry else None) or []


def read_entry(folder: Path, command: str) -> RunEntry | None:
    """The entry of a command in the `config.json` of a run folder; None where there is none."""
    entry = read_run_config(folder).get(command)
    return None if entry is None else check_type(entry, RunEntry, f"{folder / RUN_CONFIG_FILE}, {command}")


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries that differ, of both."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return {key: then.get(key) for key in keys}, {key: now.get(key) for key in keys}
