"""Training of sparse autoencoders: one trainer for every architecture, all sites from one forward pass of the model.

1. A buffer is filled with activations of all sites from the same tokens (`sae.data.activations`), and shuffled;
2. each learner (`sae.training.training_sae`: one autoencoder at one site) makes the gradients of its batch, and one
   fused Adam step updates all of them; learning rate, penalty and annealing are functions of the step alone;
3. every `log_steps` steps a line a site goes to `saes/training.jsonl`; checkpoints are made at even distances;
4. at the end each autoencoder is exported to `saes/<site>/`.

A run that was interrupted goes on with `resume=True` from its last checkpoint, and on a CPU gives the same bits as one
that was not: the order of activations is a function of the seed and the number of the fill, and the fill is made again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae._progress import ProgressBar
from sae._run.locks import lock
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import ActivationSource, ContextStream, ModelActivations, StreamState
from sae.data.cache import CachedActivations, CachedModel
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site, select_sites
from sae.saes import SAEs
from sae.sparse.workspace import Workspace
from sae.training import checkpoint as checkpoints
from sae.training.checkpoint import Checkpoint
from sae.training.config import TrainConfig, with_contexts_of
from sae.training.divergence import all_finite, diverged, warn_of_useless
from sae.training.memory import keep_freed_memory
from sae.training.run_folder import RunFolder, run_settings
from sae.training.stopping import stopping
from sae.training.training_sae import DEAD_LOOKS, TrainingSAE

log = logging.getLogger(__name__)

BUFFER_BYTES = 2 * 2**30
MIN_BUFFER_TOKENS = 8192
"""However many sites there are, and never less than one forward pass gives: every fill makes progress."""
BETAS = (0.9, 0.99)


@with_gradients
def train_saes(
    model: LanguageModel | CachedModel,
    texts: str | Path | Iterable[str] | TextSource,
    *,
    sites: str | Sequence[str | Site] = "all",
    config: TrainConfig | None = None,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    activations: CachedActivations | None = None,
) -> SAEs:
    """Train a sparse autoencoder at each site, all from the same forward passes of the model over a text.

    Args:
        model: the model; `cache.model` with `activations`, which is never run.
        texts: documents, a .txt or .jsonl file, or a hub data set; read again from its beginning where it is too short.
        sites: "all", a kind such as "resid", or sites such as ["resid_3", "mlp_2"].
        config: size, architecture and length of the training; see `TrainConfig`, whose defaults the command has too.
        out: the run folder: autoencoders go to `out`/saes/<site>, the log to `out`/saes/training.jsonl.
        resume: go on from the last checkpoint of an interrupted run with the same options.
        overwrite: replace an earlier run in that folder.
        progress: whether to show a bar on standard error.
        activations: a cache to read instead of running the model.

    Returns:
        The autoencoders by site, in the order of the forward pass. They have unit decoder rows and work on raw
        activations.

    Raises:
        UserError: an option or a site does not exist, the folder holds something else, or training diverges.
    """
    config, out, source = config or TrainConfig(), Path(out), TextSource.of(texts)
    names = sites if isinstance(sites, str) else [str(site) for site in sites]
    chosen = select_sites(names, model.sites)
    if activations is not None:
        config = with_contexts_of(activations, config)
    identity = None if activations is None else activations.identity
    run = RunFolder(out, "train", run_settings(model, source, chosen, config, cache=identity))
    folders = {site: out / "saes" / site.name for site in chosen}
    with lock(out):
        if resume and run.finished():
            log.info("the run in %s is complete; nothing to resume", out)
            return SAEs({site: SparseAutoencoder.load(folders[site], device=model.device) for site in chosen})
        rows = open_activations(model, source, chosen, config, cache=activations)
        run.start(resume=resume, overwrite=overwrite)
        learners = [TrainingSAE(site.name, site, model.widths[site], config, model.device) for site in chosen]
        log_path = out / "saes" / "training.jsonl"
        Trainer(learners, rows, config, log_path=log_path, checkpoint_folder=run.checkpoints, progress=progress).run()
        saes = {}
        for learner in learners:
            where = model.moved_sites.get(learner.site, "")
            saes[learner.site] = learner.export(
                model=model.name, fingerprint=model.fingerprint, site_path=where, reading=rows.reading
            )
            saes[learner.site].save(folders[learner.site])
        run.finish(read=asdict(rows.text_read()))
    return SAEs(saes)


def open_activations(
    model: LanguageModel | CachedModel,
    source: TextSource,
    sites: Sequence[Site],
    config: TrainConfig,
    *,
    cache: CachedActivations | None,
) -> ActivationSource:
    """What a trainer reads: the cache if there is one, else forward passes of the model over the text."""
    if cache is not None:
        return cache.only(sites)
    if isinstance(model, CachedModel):
        raise UserError(f"the model {model.name!r} is known from a cache alone: give that cache as well, or load it")
    stream = ContextStream(model, source, context_length=config.context_length, packed=config.packed)
    stream.peek()  # text that cannot be read is told before anything is written
    return ModelActivations(model, stream, sites, exclude_special=config.exclude_special)


class Trainer:
    """Learners, the activations they read, the optimizer that moves them, and where they are in the run."""

    def __init__(
        self,
        learners: Sequence[TrainingSAE],
        activations: ActivationSource,
        config: TrainConfig,
        *,
        log_path: Path,
        checkpoint_folder: Path,
        progress: bool,
    ):
        self.learners = [learner for learner in learners if learner.recipe.trained]
        self.activations, self.config = activations, config
        self.log_path, self.checkpoint_folder, self.progress = log_path, checkpoint_folder, progress
        scratch = Workspace()
        for learner in self.learners:
            learner.scratch = scratch
        self.device = learners[0].device
        groups = [{"learner": learner, **group} for learner in self.learners for group in learner.groups()]
        self.optimizer = torch.optim.Adam(
            groups or [{"params": []}],
            betas=BETAS,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step = self.fill = self.dealt = 0
        self.position = StreamState()
        self.buffer: dict[Site, Tensor] = {}
        self.orders: dict[int, Tensor] = {}  # by seed, so that each learner reads what it would read alone
        self.filled = 0
        self.explained: dict[str, float] = {}  # by name, since the last line of the log

    def run(self) -> None:
        """Trains to the end, from the last checkpoint if there is one."""
        if self.device.type == "cpu":
            keep_freed_memory()
        self._allocate()
        restored = self._restore()
        self._fill()
        if not restored:
            for learner in self.learners:
                learner.prepare(self.buffer[learner.site][: self.filled])
        if not self.learners:
            return
        saves = self._checkpoint_steps()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        bar = ProgressBar(
            total=self.config.steps, initial=self.step, unit="step", desc="train", disable=not self.progress
        )
        logged_at, logged_step = time.monotonic(), self.step
        try:
            with bar, self.log_path.open("a", encoding="utf-8") as lines, stopping() as stop:
                while self.step < self.config.steps:
                    self._one_step()
                    bar.update()
                    if self.step % self.config.log_steps == 0 or self.step == self.config.steps:
                        seconds = time.monotonic() - logged_at
                        speed = (self.step - logged_step) * self.config.batch / max(seconds, 1e-9)
                        bar.set_postfix_str(self._log(lines, speed))
                        logged_at, logged_step = time.monotonic(), self.step
                    if self.step in saves or stop:
                        lines.flush()
                        self._save()
                    if stop and self.step < self.config.steps:
                        raise KeyboardInterrupt
            self._check_weights()
            warn_of_useless(self.explained)
        except KeyboardInterrupt:
            log.warning("interrupted after %d of %d steps; the last checkpoint stands", self.step, self.config.steps)
            raise

    def _allocate(self) -> None:
        """The buffers of all sites, in float32, within the memory allowed."""
        bytes_per_token = 4 * sum(self.activations.widths.values())
        wanted = min(self.config.buffer_tokens, self.config.tokens, BUFFER_BYTES // bytes_per_token)
        size = max(wanted, MIN_BUFFER_TOKENS, self.config.batch, self.activations.rows_at_once)
        self.buffer = {
            site: torch.empty(size, width, device=self.device) for site, width in self.activations.widths.items()
        }

    def _fill(self) -> None:
        """Fills the buffer from the present position and deals the rows out in a new order."""
        self.activations.seek(self.position)
        self.filled = self.activations.fill(self.buffer)
        for seed in {learner.config.seed for learner in self.learners}:
            generator = torch.Generator().manual_seed(1_000_003 * seed + self.fill)
            self.orders[seed] = torch.randperm(self.filled, generator=generator).to(self.device)

    def _next_rows(self) -> dict[int, Tensor]:
        """Rows of the buffer for the next batch [n], by seed; fills it again when fewer than a batch are left."""
        batch = self.config.batch
        if (self.dealt + 1) * batch > self.filled and self.dealt > 0:
            self.position = self.activations.position()
            self.fill, self.dealt = self.fill + 1, 0
            self._fill()
        dealt = slice(self.dealt * batch, (self.dealt + 1) * batch)
        self.dealt += 1
        return {seed: order[dealt] for seed, order in self.orders.items()}

    def _one_step(self) -> None:
        rows = self._next_rows()
        cast = torch.autocast("cuda", torch.bfloat16) if self._casts else nullcontext()
        with cast:
            for learner in self.learners:
                x = self.buffer[learner.site][rows[learner.config.seed]]
                if self.step in learner.resample_steps:
                    learner.resample(x, self.optimizer.state, self.step)
                learner.step(x, self.step)
        if self.device.type == "cpu" or self.step % DEAD_LOOKS == 0:  # a look at a number waits for the device
            self._check_losses()
        for group in self.optimizer.param_groups:
            learner = group["learner"]
            group["lr"] = group["factor"] * learner.config.learning_rate_at(self.step, learner.width)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for learner in self.learners:
            learner.constrain()
        self.step += 1

    def _check_losses(self) -> None:
        """`UserError` where a loss since the last line of the log is not finite."""
        losses = torch.stack([learner.state["loss"] for learner in self.learners])
        if not losses.isfinite().all():
            worst = int((~losses.isfinite()).nonzero()[0])
            raise diverged(self.learners[worst].name, self.step, self.checkpoint_folder)

    def _check_weights(self) -> None:
        """`UserError` where a loss or weight is not finite: such an autoencoder is neither saved nor exported."""
        self._check_losses()
        for learner in self.learners:
            if not all_finite(weight.detach() for weight in learner.weights.values()):
                raise diverged(learner.name, self.step, self.checkpoint_folder)

    @property
    def _casts(self) -> bool:
        return self.config.autocast and self.device.type == "cuda"

    def _log(self, lines: Any, speed: float) -> str:
        """Writes a line a learner and returns the means for the bar."""
        reports = {learner: learner.report() for learner in self.learners}
        self.explained = {learner.name: report["explained_variance"] for learner, report in reports.items()}
        epoch = self.activations.position().epoch
        for learner, report in reports.items():
            rate = learner.config.learning_rate_at(self.step - 1, learner.width)
            line = {"step": self.step, "tokens": self.step * self.config.batch, "site": learner.name, **report}
            line |= {"learning_rate": rate, "tokens_per_second": round(speed), "epoch": epoch}
            lines.write(json.dumps(line) + "\n")
        shared = ("loss", "l0", "explained_variance", "dead")  # what every architecture reports
        mean = {key: sum(report[key] for report in reports.values()) / len(reports) for key in shared}
        named = f"loss {mean['loss']:.3f}, L0 {mean['l0']:.1f}, explained {mean['explained_variance']:.3f}"
        return f"{named}, dead {mean['dead']:.2f}, {speed:,.0f} tokens/s"

    def _checkpoint_steps(self) -> set[int]:
        count, steps = self.config.checkpoints, self.config.steps
        return {round(i * steps / count) for i in range(1, count + 1)} if count else set()

    def _tensors(self) -> dict[str, Tensor]:
        """Everything that changes in training, by name; the tensors themselves, not copies."""
        tensors: dict[str, Tensor] = {}
        for learner in self.learners:
            tensors |= checkpoints.tensors_of(learner.name, learner.weights, learner.state, self.optimizer)
        return tensors

    def _save(self) -> None:
        self._check_weights()
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
            checkpoints.make_moments(learner.name, learner.weights, self.optimizer, found.tensors)
        with torch.no_grad():
            checkpoints.put_in_force(self._tensors(), found, self.checkpoint_folder)
        checkpoints.cut_log(self.log_path, found.log_bytes)
        log.info("resumed after step %d of %d", self.step, self.config.steps)
        return True
