"""The folder of a training run: what it was begun with, whether it may go on, whether it ended.

`config.json` holds the settings under the name of the command, and `complete` beside them: false from the start on,
true once everything is on disk. So a run that replaces an older one is never taken for it, whenever it was killed.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from sae import checkpoint as checkpoints
from sae.config import TrainConfig
from sae.errors import UserError
from sae.files import prepare_folder, read_json, remove_temporary, write_json
from sae.sites import Site
from sae.text import TextSource

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
COMPARED = ("model_fingerprint", "text_fingerprint", "cache", "sites", "site_paths", "config")
"""Settings that must be the same when a run goes on."""
SHOWN_AS = {"model_fingerprint": "model", "text_fingerprint": "text"}
"""Settings that a person knows by another entry."""


class ModelFacts(Protocol):
    """What a run must know of a model, whether it is loaded or known from a cache of its activations."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def sites(self) -> tuple[Site, ...]: ...
    @property
    def moved_sites(self) -> Mapping[Site, str]: ...
    @property
    def widths(self) -> Mapping[Site, int]: ...
    @property
    def device(self) -> torch.device: ...


def run_settings(
    model: ModelFacts,
    source: TextSource,
    sites: Sequence[Site],
    config: TrainConfig | Mapping[str, TrainConfig],
    *,
    cache: str | None = None,
) -> dict[str, Any]:
    """What the result of a run depends on. `cache` is the identity of the activation cache it reads, if it does."""
    configs = asdict(config) if isinstance(config, TrainConfig) else {n: asdict(c) for n, c in config.items()}
    return {
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "text": source.name,
        "text_fingerprint": source.fingerprint,
        "cache": cache,
        "sites": [site.name for site in sites],
        "site_paths": {site.name: path for site, path in model.moved_sites.items() if site in sites},
        "device": str(model.device),
        "config": configs,
    }


@dataclass(frozen=True)
class RunFolder:
    """One run on disk."""

    path: Path
    """The folder."""
    command: str
    """Under which name its settings are kept: train or sweep."""
    settings: dict[str, Any]
    """What its result depends on (`run_settings`)."""

    @property
    def checkpoints(self) -> Path:
        """Where its checkpoints are while it runs."""
        return self.path / CHECKPOINTS

    def start(self, *, resume: bool, overwrite: bool) -> None:
        """Make the folder and write its settings; when resuming, refuse others than it was begun with."""
        before = self.recorded() if resume else None
        if before is not None and not before.get("complete"):
            self._check_same(before)
            remove_temporary(self.path)
            return
        if before is not None:
            self._check_same(before, but=("config",))
        prepare_folder(self.path, overwrite=overwrite or resume)
        checkpoints.remove(self.checkpoints)
        remove_temporary(self.path)
        for outdated in (self.path / "saes").glob("evaluation.*"):
            outdated.unlink()
        self._write({**self._joined(before), "complete": False})

    def finish(self, **found: Any) -> None:
        """Say that everything is on disk; `found` is kept beside the settings."""
        self._write({**self._joined(self.recorded()), "complete": True, **found})
        checkpoints.remove(self.checkpoints)

    def _joined(self, before: Mapping[str, Any] | None) -> dict[str, Any]:
        """The settings; those of a sweep keep the configs of earlier ones in the same folder."""
        if self.command != "sweep" or before is None:
            return self.settings
        return {**self.settings, "config": {**before["config"], **self.settings["config"]}}

    def finished(self) -> bool:
        """Whether a run with these settings ended here; refuses a run with others."""
        before = self.recorded()
        if before is None or not before.get("complete"):
            return False
        self._check_same(before)
        return True

    def recorded(self) -> dict[str, Any] | None:
        """The settings in the folder, None where there are none of this command."""
        path = self.path / CONFIG_FILE
        return read_json(path).get(self.command) if path.is_file() else None

    def _write(self, entry: dict[str, Any]) -> None:
        """The settings and the versions; what other commands left in the file stays."""
        path = self.path / CONFIG_FILE
        known: dict[str, Any] = read_json(path) if path.is_file() else {"schema_version": 1}
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        write_json(path, {**known, self.command: entry, "versions": {**known.get("versions", {}), **versions}})

    def _check_same(self, before: Mapping[str, Any], *, but: Sequence[str] = ()) -> None:
        for key in COMPARED:
            if key in but:
                continue
            then, now = before.get(key), json.loads(json.dumps(self.settings[key]))
            if (then or None) != (now or None):
                shown = SHOWN_AS.get(key, key)
                if shown != key and before.get(shown) != self.settings[shown]:
                    then, now = before.get(shown), self.settings[shown]
                elif shown != key:
                    then, now = f"{before.get(shown)} ({then})", f"{self.settings[shown]} as it is now ({now})"
                elif isinstance(then, dict) and isinstance(now, dict):
                    then, now = _differing(then, now)
                begun = f"the run in {str(self.path)!r} was begun with {shown} {then!r}"
                raise UserError(f"{begun} and cannot be resumed with {now!r}: give the same options or another folder")


def _differing(then: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entries that differ, of both."""
    keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
    return {key: then.get(key) for key in keys}, {key: now.get(key) for key in keys}
