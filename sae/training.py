"""Training of sparse autoencoders: one trainer for every architecture, all sites from one forward pass of the model.

1. A buffer is filled with activations of all sites from the same tokens (`sae.activations`), and shuffled;
2. each learner (`sae.learner`: one autoencoder at one site) makes the gradients of its batch, and one fused Adam step
   updates all of them; learning rate, penalty and annealing are functions of the step alone;
3. every `log_steps` steps a line a site goes to `saes/training.jsonl`; checkpoints are made at even distances;
4. at the end each autoencoder is exported to `saes/<site>/`.

A run that was interrupted goes on with `resume=True` from its last checkpoint, and on a CPU gives the same bits as one
that was not: the order of activations is a function of the seed and the number of the fill, and the fill is made again.
"""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae import checkpoint as checkpoints
from sae.activations import ActivationSource, ContextStream, ModelActivations, StreamState
from sae.autoencoder import SparseAutoencoder, is_sae_folder
from sae.checkpoint import Checkpoint
from sae.config import TrainConfig
from sae.errors import UserError
from sae.files import prepare_folder, read_json, write_json
from sae.learner import Learner
from sae.model import LanguageModel
from sae.sites import Site, select_sites
from sae.text import TextSource

__all__ = ["TrainConfig", "Trainer", "train"]

log = logging.getLogger(__name__)

BUFFER_BYTES = 2 * 2**30
MIN_BUFFER_TOKENS = 8192
"""More than one forward pass gives, so that every fill makes progress."""
BETAS = (0.9, 0.99)


def train(
    model: LanguageModel,
    texts: str | Path | Iterable[str] | TextSource,
    *,
    sites: str | Sequence[str | Site] = "all",
    config: TrainConfig | None = None,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    activations: ActivationSource | None = None,
) -> dict[Site, SparseAutoencoder]:
    """Trains an autoencoder at each site; returns them in forward order and leaves them in `out`/saes/<site>.

    `activations` replaces forward passes of the model, for example by a `CachedActivations` of this model and text.
    """
    config, out, source = config or TrainConfig(), Path(out), TextSource.of(texts)
    names = sites if isinstance(sites, str) else [str(site) for site in sites]
    chosen = select_sites(names, model.sites)
    settings = run_settings(model, source, chosen, config)
    learners = [Learner(site.name, site, model.widths[site], config, model.device) for site in chosen]
    folders = {learner.name: out / "saes" / learner.name for learner in learners}
    if resume and _is_finished(out, settings, folders):
        log.info("the run in %s is complete; nothing to resume", out)
        return {site: SparseAutoencoder.load(folders[site.name], device=model.device) for site in chosen}
    if activations is None:
        stream = ContextStream(model, source, context_length=config.context_length, packed=config.packed)
        stream.peek()  # text that cannot be read is told before anything is written
        activations = ModelActivations(model, stream, chosen, exclude_special=config.exclude_special)
    start_folder(out, settings, resume=resume, overwrite=overwrite)
    Trainer(learners, activations, config, out=out, progress=progress).run()
    saes = {}
    for learner in learners:
        saes[learner.site] = learner.export(model=model.name, fingerprint=model.fingerprint)
        saes[learner.site].save(folders[learner.name])
    checkpoints.remove(out / "checkpoints")
    return saes


class Trainer:
    """Learners, the activations they read, the optimizer that moves them, and where they are in the run."""

    def __init__(
        self,
        learners: Sequence[Learner],
        activations: ActivationSource,
        config: TrainConfig,
        *,
        out: Path,
        progress: bool,
    ):
        self.learners, self.activations, self.config = list(learners), activations, config
        self.log_path, self.checkpoint_folder = out / "saes" / "training.jsonl", out / "checkpoints"
        self.progress = progress
        self.device = learners[0].device
        self.optimizer = torch.optim.Adam(
            [{"params": list(learner.weights.values())} for learner in learners],
            betas=BETAS,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step = self.fill = self.dealt = 0
        self.position = StreamState()
        self.buffer: dict[Site, Tensor] = {}
        self.order = torch.empty(0, dtype=torch.int64)

    def run(self) -> None:
        """Trains to the end, from the last checkpoint if there is one."""
        self._allocate()
        restored = self._restore()
        self._fill()
        if not restored:
            for learner in self.learners:
                learner.prepare(self.buffer[learner.site][: len(self.order)])
        if not any(learner.recipe.trained for learner in self.learners):
            return
        saves = self._checkpoint_steps()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        bar = tqdm(total=self.config.steps, initial=self.step, unit="step", disable=not self.progress)
        logged_at, logged_step = time.monotonic(), self.step
        try:
            with bar, self.log_path.open("a", encoding="utf-8") as lines:
                while self.step < self.config.steps:
                    self._one_step()
                    bar.update()
                    if self.step % self.config.log_steps == 0 or self.step == self.config.steps:
                        seconds = time.monotonic() - logged_at
                        speed = (self.step - logged_step) * self.config.batch / max(seconds, 1e-9)
                        bar.set_postfix_str(self._log(lines, speed))
                        logged_at, logged_step = time.monotonic(), self.step
                    if self.step in saves:
                        lines.flush()
                        self._save()
        except KeyboardInterrupt:
            log.warning("interrupted after %d of %d steps; the last checkpoint stands", self.step, self.config.steps)
            raise

    def _allocate(self) -> None:
        """The buffers of all sites, in float32, within the memory allowed."""
        bytes_per_token = 4 * sum(self.activations.widths.values())
        wanted = min(self.config.buffer_tokens, self.config.tokens, BUFFER_BYTES // bytes_per_token)
        size = max(wanted, MIN_BUFFER_TOKENS, self.config.batch)
        self.buffer = {
            site: torch.empty(size, width, device=self.device) for site, width in self.activations.widths.items()
        }

    def _fill(self) -> None:
        """Fills the buffer from the present position and deals the rows out in a new order."""
        self.activations.seek(self.position)
        n = self.activations.fill(self.buffer)
        generator = torch.Generator().manual_seed(1_000_003 * self.config.seed + self.fill)
        self.order = torch.randperm(n, generator=generator).to(self.device)

    def _next_rows(self) -> Tensor:
        """Rows of the buffer for the next batch [n]; fills it again when fewer than a batch are left."""
        batch = self.config.batch
        if (self.dealt + 1) * batch > len(self.order) and self.dealt > 0:
            self.position = self.activations.position()
            self.fill, self.dealt = self.fill + 1, 0
            self._fill()
        rows = self.order[self.dealt * batch : (self.dealt + 1) * batch]
        self.dealt += 1
        return rows

    def _one_step(self) -> None:
        rows = self._next_rows()
        cast = torch.autocast("cuda", torch.bfloat16) if self._casts else nullcontext()
        with cast:
            for learner, group in zip(self.learners, self.optimizer.param_groups, strict=True):
                group["lr"] = learner.config.learning_rate_at(self.step, learner.width)
                x = self.buffer[learner.site][rows]
                if self.step in learner.resample_steps:
                    learner.resample(x, self.optimizer.state, self.step)
                learner.step(x, self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for learner in self.learners:
            learner.constrain()
        self.step += 1

    @property
    def _casts(self) -> bool:
        return self.config.autocast and self.device.type == "cuda"

    def _log(self, lines: Any, speed: float) -> str:
        """Writes a line a learner and returns the means for the bar."""
        reports = {learner: learner.report() for learner in self.learners}
        epoch = self.activations.position().epoch
        for learner, report in reports.items():
            rate = learner.config.learning_rate_at(self.step - 1, learner.width)
            line = {"step": self.step, "tokens": self.step * self.config.batch, "site": learner.name, **report}
            line |= {"learning_rate": rate, "tokens_per_second": round(speed), "epoch": epoch}
            lines.write(json.dumps(line) + "\n")
        mean = {key: sum(r[key] for r in reports.values()) / len(reports) for key in next(iter(reports.values()))}
        named = f"loss {mean['loss']:.3f}, L0 {mean['l0']:.1f}, explained {mean['explained_variance']:.3f}"
        return f"{named}, dead {mean['dead']:.2f}, {speed:,.0f} tokens/s"

    def _checkpoint_steps(self) -> set[int]:
        count, steps = self.config.checkpoints, self.config.steps
        return {round(i * steps / count) for i in range(1, count + 1)} if count else set()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name; the tensors themselves, not copies."""
        tensors: dict[str, Tensor] = {}
        for learner in self.learners:
            tensors |= {f"{learner.name}/state/{key}": tensor for key, tensor in learner.state.items()}
            for key, weight in learner.weights.items():
                tensors[f"{learner.name}/weights/{key}"] = weight.detach()
                moments = self.optimizer.state.get(weight, {})
                tensors |= {f"{learner.name}/adam/{key}/{moment}": t for moment, t in moments.items()}
        return tensors

    def _save(self) -> None:
        size = self.log_path.stat().st_size
        state = Checkpoint(self.step, self.fill, self.dealt, self.position, size, self._tensors())
        checkpoints.save(self.checkpoint_folder, state)

    def _restore(self) -> bool:
        """Puts the last checkpoint in force; False if there is none."""
        found = checkpoints.latest(self.checkpoint_folder)
        if found is None:
            self.log_path.unlink(missing_ok=True)
            return False
        self.step, self.fill, self.dealt, self.position = found.step, found.fill, found.dealt, found.position
        for learner in self.learners:
            for key, weight in learner.weights.items():
                prefix = f"{learner.name}/adam/{key}/"
                moments = {n.removeprefix(prefix): t for n, t in found.tensors.items() if n.startswith(prefix)}
                self.optimizer.state[weight] = {moment: tensor.to(self.device) for moment, tensor in moments.items()}
        with torch.no_grad():
            for name, tensor in self._tensors().items():
                tensor.copy_(found.tensors[name])
        with self.log_path.open("r+b") as lines:
            lines.truncate(found.log_bytes)
        log.info("resumed after step %d of %d", self.step, self.config.steps)
        return True


def run_settings(
    model: LanguageModel, source: TextSource, sites: Sequence[Site], config: TrainConfig | Mapping[str, TrainConfig]
) -> dict[str, Any]:
    """What a run depends on, as it is written to config.json."""
    configs = asdict(config) if isinstance(config, TrainConfig) else {n: asdict(c) for n, c in config.items()}
    return {
        "schema_version": 1,
        "command": "train",
        "model": model.name,
        "model_fingerprint": model.fingerprint,
        "text": source.name,
        "sites": [site.name for site in sites],
        "train": configs,
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "device": str(model.device),
    }


def start_folder(out: Path, settings: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
    """Makes the run folder and writes its config.json; when resuming, refuses other settings than it was begun with."""
    path = out / "config.json"
    if resume and path.is_file():
        _check_same(read_json(path), settings, out)
        return
    prepare_folder(out, overwrite=overwrite or resume)
    checkpoints.remove(out / "checkpoints")
    write_json(path, settings)


def _check_same(before: Any, now: dict[str, Any], out: Path) -> None:
    for key in ("model_fingerprint", "text", "sites", "train"):
        if before.get(key) != json.loads(json.dumps(now[key])):
            begun = f"the run in {str(out)!r} was begun with {key} {before.get(key)!r}"
            raise UserError(f"{begun} and cannot be resumed with {now[key]!r}")


def _is_finished(out: Path, settings: dict[str, Any], folders: Mapping[str, Path]) -> bool:
    """Whether a run with these settings ended: every autoencoder is there and no checkpoint is left."""
    if not (out / "config.json").is_file() or (out / "checkpoints").exists():
        return False
    _check_same(read_json(out / "config.json"), settings, out)
    return all(is_sae_folder(folder) for folder in folders.values())
