"""The loop that training and fine-tuning share: steps, log, checkpoints, interruption, and going on after one.

1. `_one_step` is made until everything is read; every `log_steps` steps `_log` writes lines, a site each.
2. Checkpoints are made at even distances. The first Ctrl-C or SIGTERM asks the loop to stop after the present step and
   to leave a checkpoint; the second stops at once.
3. A run goes on from its last checkpoint. The log is cut to what it was then.
4. Of several processes (`sae._run.processes`) the first writes the log and speaks; all stop after the same step.
5. Losses or weights that are not finite end the run with a sentence; what was saved before stays.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal, Protocol, TextIO

import torch
from torch import Tensor

from sae._progress import ProgressBar
from sae._run.processes import Processes
from sae.data.activations import StreamState
from sae.errors import UserError
from sae.training import checkpoint as checkpoints
from sae.training.checkpoint import Checkpoint
from sae.training.config import FinetuneConfig, TrainConfig
from sae.training.run_folder import RunFolder
from sae.training.stopping import Stop, stopping

log = logging.getLogger(__name__)

STOP_STEPS = 16
"""Steps after which several processes ask one another whether to stop."""
BETAS = (0.9, 0.99)
"""Adam's decay rates; .999 remembers the large gradients of the start too long."""


class Trained(Protocol):
    """An autoencoder that the loop trains."""

    weights: dict[str, Tensor]
    state: dict[str, Tensor]


class TrainingLoop(ABC):
    """Autoencoders by name, the optimizer that moves them, and where they are in the run."""

    unit: ClassVar[Literal["step", "token"]]
    """Unit of progress."""
    title: ClassVar[str]
    """Beginning of the progress bar."""
    counters: ClassVar[tuple[str, ...]]
    """Attributes, whole numbers, that a resumed run needs beside the step."""
    total: int
    """Units of the whole run."""
    position = StreamState()
    """Where in the text a resumed run begins to read."""
    processes = Processes()
    """The processes that share the training."""

    def __init__(
        self,
        trained: Mapping[str, Trained],
        optimizer: torch.optim.Optimizer,
        config: TrainConfig | FinetuneConfig,
        run: RunFolder,
        *,
        progress: bool,
    ) -> None:
        self.trained, self.optimizer = dict(trained), optimizer
        self.log_steps, self.n_checkpoints = config.log_steps, config.checkpoints
        self.files, self.progress = run, progress
        self.step = 0
        self.explained: dict[str, float] = {}  # explained variance by name, since the last line of the log

    @property
    def savers(self) -> Processes:
        """Processes that each have tensors to save."""
        return self.processes

    @property
    def done(self) -> int:
        """Units done."""
        return self.step

    @abstractmethod
    def _one_step(self) -> None:
        """Makes one step of the optimizer."""

    @abstractmethod
    def _log(self, lines: TextIO) -> str:
        """Writes a line for each autoencoder and returns the means for the bar."""

    def _run_loop(self) -> None:
        """Steps to the end of the run."""
        self.files.log_path.parent.mkdir(parents=True, exist_ok=True)
        bar = ProgressBar(
            total=self.total, initial=self.done, unit=self.unit, desc=self.title, disable=not self.progress
        )
        try:
            log_path = self.files.log_path if self.processes.is_first else Path(os.devnull)
            with bar, log_path.open("a", encoding="utf-8") as lines, stopping() as stop:
                while self.done < self.total:
                    done = self.done
                    self._one_step()
                    bar.update(min(self.done, self.total) - done)
                    if self.step % self.log_steps == 0 or self.done >= self.total:
                        bar.set_postfix_str(self._log(lines))
                    stops = self._stops(stop)
                    if stops or self._checkpoints_due(done) < self._checkpoints_due(self.done):
                        lines.flush()
                        self._save()
                    if stops and self.done < self.total:
                        raise KeyboardInterrupt
            self._check_finite()
            warn_of_useless(self.explained)
        except KeyboardInterrupt:
            log.warning("interrupted after %d of %d %ss; the last checkpoint stands", self.done, self.total, self.unit)
            raise

    def _stops(self, stop: Stop) -> bool:
        """Whether to stop after this step; of several processes, whether any was asked to, every few steps."""
        if self.processes.size == 1:
            return bool(stop)
        return self.step % STOP_STEPS == 0 and any(self.processes.gathered(bool(stop)))

    def _checkpoints_due(self, done: int) -> int:
        """Checkpoints of the run that are due once so much is done."""
        return min(done, self.total) * self.n_checkpoints // self.total

    def _check_finite(self) -> None:
        """`UserError` where a loss or weight is not finite: such an autoencoder is neither saved nor exported."""
        for name, sae in self.trained.items():
            if not all(bool(tensor.isfinite().all()) for tensor in (*sae.weights.values(), *sae.state.values())):
                raise diverged(name, self.step, self.files.checkpoints)

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name; the tensors themselves, not copies."""
        tensors: dict[str, Tensor] = {}
        for name, sae in self.trained.items():
            tensors |= checkpoints.tensors_of(name, sae.weights, sae.state, self.optimizer)
        return tensors

    def _to_save(self) -> Mapping[str, Tensor]:
        """The tensors that this process writes into a checkpoint."""
        return self._tensors()

    def _of_this_process(self, saved: Checkpoint) -> Checkpoint:
        """A checkpoint with the tensors that this process has, of all that are in it."""
        return saved

    def _save(self) -> None:
        self._check_finite()
        log_bytes = self.files.log_path.stat().st_size
        counters = {name: getattr(self, name) for name in self.counters}
        state = Checkpoint(self.step, counters, self.position, log_bytes, self._to_save())
        checkpoints.save(self.files.checkpoints, state, self.savers)

    def _restore(self) -> bool:
        """Puts the last checkpoint in force; False if there is none."""
        saved = checkpoints.latest(self.files.checkpoints)
        if saved is None:
            self.processes.by_first(lambda: self.files.log_path.unlink(missing_ok=True))
            return False
        saved = self._of_this_process(saved)
        self.step, self.position = saved.step, saved.position
        for name in self.counters:
            setattr(self, name, saved.counters[name])
        for name, sae in self.trained.items():
            checkpoints.make_moments(name, sae.weights, self.optimizer, saved.tensors)
        with torch.no_grad():
            checkpoints.put_in_force(self._tensors(), saved, self.files.checkpoints)
        self.processes.by_first(lambda: checkpoints.cut_log(self.files.log_path, saved.log_bytes))
        log.info("resumed after %d of %d %ss", self.done, self.total, self.unit)
        return True


def diverged(name: str, step: int, checkpoint_folder: Path) -> UserError:
    """The error for an autoencoder whose loss or weights are no numbers any more; raise what this returns."""
    saved = sorted(path.name for path in checkpoint_folder.glob("step_*")) if checkpoint_folder.is_dir() else []
    stands = f"the checkpoint {saved[-1]} stands" if saved else "there is no checkpoint yet"
    return UserError(
        f"the training of {name} diverged: at step {step} its loss or weights are not finite, so nothing was exported "
        f"({stands}): train again with a lower learning rate, or less extreme weights of the penalties"
    )


def warn_of_useless(explained: Mapping[str, float]) -> None:
    """Warns of each autoencoder, by name, whose explained variance is below zero: its x̂ is worse than the mean."""
    for name, value in explained.items():
        if not value >= 0:
            log.warning(
                "%s: explained variance is %.3g, below zero: the mean activation is a better reconstruction than this "
                "autoencoder's; train it longer, or with a lower learning rate",
                name,
                value,
            )
