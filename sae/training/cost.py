"""Estimate what a training takes before it begins, by making a few of its steps and multiplying. Nothing is written.

1. A small buffer is filled with activations of the text's beginning: seconds of a token read.
2. A few steps are made on it, after `WARM_UP` of them: seconds of a step, the median, and the memory of its
   intermediates, counted while one step is made (`sae._peak_memory`).
3. Time = tokens · seconds of a token read + steps · seconds of a step. Looks at dead features and resampling come on
   top where an architecture has them.
4. Memory = model + weights and Adam's moments (12 bytes a parameter in float32) + buffer + what a step takes
   (gradients, 4 bytes a parameter, and intermediates).
5. Disk = the autoencoders, and while it runs `N_CHECKPOINTS` checkpoints, plus the one that is being written.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sae._peak_memory import peak_memory
from sae._run.processes import current
from sae._units import duration, seconds_of, size
from sae.data.cache import CachedActivations, CachedModel
from sae.data.text import TextSource
from sae.model.device_map import bytes_at_home
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.saes import free_memory
from sae.training.checkpoint import N_CHECKPOINTS
from sae.training.config import TrainConfig, with_contexts_of
from sae.training.parallel import Parallel, choose_parallel
from sae.training.run_folder import RunFolder
from sae.training.train import TRAINERS, share_of_work
from sae.training.trainer import MIN_BUFFER_TOKENS, Trainer, rows_in_buffer

WARM_UP, MEASURED = 2, 5
"""Steps that are made before the clock runs, and while it does."""


@dataclass(frozen=True)
class TrainingEstimate:
    """The cost of a training."""

    n_sites: int
    tokens: int
    steps: int
    seconds: dict[str, float]
    """Seconds by what takes them: the model (or reading the cache), and the autoencoders' steps."""
    memory: dict[str, int]
    """Bytes by what takes them, in the process that needs most."""
    disk: dict[str, int]
    """Bytes of the finished autoencoders, and of checkpoints while it runs."""
    free: int | None
    """Bytes that a process can have beside the model; None where nobody says."""
    peaks: list[int]
    """Bytes of each process."""
    parallel: Parallel
    """What several processes share out."""

    @property
    def tokens_per_second(self) -> float:
        """Tokens that pass through model and autoencoders in a second."""
        return self.tokens / max(sum(self.seconds.values()), 1e-9)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "sites": self.n_sites,
            "tokens": self.tokens,
            "steps": self.steps,
            "seconds": self.seconds,
            "total_seconds": sum(self.seconds.values()),
            "tokens_per_second": self.tokens_per_second,
            "memory_bytes": self.memory,
            "peak_bytes": sum(self.memory.values()),
            "free_bytes": self.free,
            "disk_bytes": self.disk,
            "processes": len(self.peaks),
            "peak_bytes_of_processes": self.peaks,
        }

    def text(self) -> str:
        """A few lines for the terminal."""
        times = ", ".join(f"{name} {duration(s)}" for name, s in self.seconds.items())
        sizes = ", ".join(f"{name} {size(n)}" for name, n in self.memory.items() if n >= 2**20)
        disk = ", ".join(f"{name} {size(n)}" for name, n in self.disk.items())
        free = "" if self.free is None else f"; free beside the model: {size(self.free)}"
        n = len(self.peaks)
        several = "" if n == 1 else f", {n} processes with a share of the {self.parallel} each"
        each = "" if n == 1 else f" in each process, {size(min(self.peaks))} to {size(max(self.peaks))}; the largest"
        lines = [
            f"{self.tokens:,} tokens in {self.steps:,} steps at {self.n_sites} sites{several}: "
            f"{self.tokens_per_second:,.0f} tokens/s",
            f"estimated time: {duration(sum(self.seconds.values()))} ({times})",
            f"estimated memory{each}: {size(sum(self.memory.values()))} ({sizes}){free}",
            f"estimated disk: {disk}",
        ]
        needed = sum(self.memory.values()) - self.memory["model"]
        if self.free is not None and needed > self.free:
            lines.append(
                f"this needs {size(needed)} beside the model, and {size(self.free)} are free: train fewer --sites at a "
                "time, or take fewer --features, a smaller --batch-size or fewer --buffer-tokens"
            )
        return "\n".join(lines)


@with_gradients
def estimate_training(
    model: LanguageModel | CachedModel,
    texts: str | Path | Iterable[str] | TextSource,
    *,
    sites: str | Sequence[str | Site] = "all",
    config: TrainConfig | None = None,
    activations: CachedActivations | None = None,
    parallel: Parallel | None = None,
) -> TrainingEstimate:
    """Make a few steps of a training, together where there are several processes, and say what all of it takes on this
    machine. Nothing is written.

    Args:
        model, texts, sites, config, activations, parallel: as in `train_saes`.

    Returns:
        Time, memory and disk space.

    Raises:
        UserError: as `train_saes` does before it begins.
    """
    config, source = config or TrainConfig(), TextSource.of(texts)
    config = config if activations is None else with_contexts_of(activations, config)
    chosen = select_sites(sites, model.sites)
    processes = current()
    parallel = choose_parallel(parallel, chosen, config, processes, cached=activations is not None)
    saes, rows = share_of_work(model, source, chosen, config, parallel, cache=activations)
    small = replace(config, buffer_tokens=max(MIN_BUFFER_TOKENS, 2 * config.batch))
    trial_class = type("_Trial", (_Measured, TRAINERS[parallel]), {})
    trial = trial_class(saes, rows, small, RunFolder(Path(), "train", {}), progress=False, processes=processes)
    reading, step, peak = trial.measure()
    n_weights = _bytes(weight for sae in trial.saes for weight in sae.weights.values())
    in_checkpoint = _bytes(trial._tensors().values())
    memory = {
        "model": 0 if isinstance(model, CachedModel) or model.server else bytes_at_home(model.hf),
        "weights": n_weights,
        "Adam's moments": in_checkpoint - n_weights,
        "buffer": 4 * rows_in_buffer(rows, config) * sum(rows.widths[site] for site in trial.held),
        "gradients and intermediates": peak,
    }
    shares = processes.gathered((reading, step, memory, n_weights, in_checkpoint))
    readings, steps, memories, weights, checkpoints = (list(column) for column in zip(*shares, strict=True))
    written = max if parallel == "data" else sum  # of data by one process, for all have the same
    free = free_memory(model.device)
    return TrainingEstimate(
        n_sites=len(chosen),
        tokens=config.tokens,
        steps=config.steps,
        seconds={
            "model" if activations is None else "reading the cache": max(readings) * config.tokens,
            "autoencoders": max(steps) * config.steps,
        },
        memory=max(memories, key=lambda of_process: sum(of_process.values())),
        disk={
            "autoencoders": written(weights),
            "checkpoints": (N_CHECKPOINTS + 1) * written(checkpoints) * bool(config.checkpoints),
        },
        free=free if free is None or model.device.type == "cuda" else free // processes.n_local,
        peaks=[sum(of_process.values()) for of_process in memories],
        parallel=parallel,
    )


class _Measured(Trainer):
    """A training of which a few steps are made."""

    def measure(self) -> tuple[float, float, int]:
        """Seconds of a token read, seconds of a step, and bytes that a step takes beside what it leaves."""
        start = seconds_of(self.device)
        self._allocate()
        self._fill()
        reading = (seconds_of(self.device) - start) / self.filled
        if not self.saes:  # nothing is trained at identities
            return reading, 0.0, 0
        if self.processes.size > 1:
            self._prepare()
        for sae in self.saes if self.processes.size == 1 else ():
            sae.prepare(self.buffer[sae.site][: self.filled], self.buffer[sae.read_site][: self.filled])
        steps = []
        for _ in range(WARM_UP + MEASURED):
            start = seconds_of(self.device)
            self._one_step()
            steps.append(seconds_of(self.device) - start)
        return reading, statistics.median(steps[WARM_UP:]), peak_memory(self._one_step, self.device)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
