"""Training of sparse autoencoders: one trainer for every architecture, all sites from one forward pass of the model.

1. A buffer is filled with activations of all sites from the same tokens (`sae.data.activations`), and shuffled;
2. each `TrainingSAE` (one autoencoder at one site) makes the gradients of its batch, and one fused Adam step updates
   all of them, with the learning rates of its `Schedule`;
3. every `log_steps` steps a line a site goes to `saes/training.jsonl`; checkpoints are made at even distances;
4. `export` makes of each the autoencoder that is saved.

A run that was interrupted goes on with `resume=True` from its last checkpoint, and on a CPU gives the same bits as one
that was not: the order of activations is a function of the seed and the number of the fill, and the fill is made again.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TextIO

import torch
from torch import Tensor

from sae._run.processes import Processes
from sae.autoencoder import SparseAutoencoder
from sae.data.activations import ActivationSource, ContextStream, ModelActivations
from sae.data.cache import CachedActivations, CachedModel
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.sparse.encoder_pass import Workspace
from sae.sparse.shards import FeatureShards
from sae.training.config import TrainConfig
from sae.training.loop import BETAS, TrainingLoop, diverged
from sae.training.run_folder import RunFolder
from sae.training.training_sae import DEAD_LOOKS, TrainingSAE

log = logging.getLogger(__name__)

BUFFER_BYTES = 2 * 2**30
MIN_BUFFER_TOKENS = 8192
"""However many sites there are, and never less than one forward pass gives: every fill makes progress."""


def read_site(site: Site, config: TrainConfig) -> Site:
    """The site that the dictionary of a site reads: a transcoder's, of an MLP, before it."""
    return Site(config.read, site.layer) if config.kind == "transcoder" and site.kind == "mlp" else site


def begin(
    name: str,
    site: Site,
    rows: ActivationSource,
    config: TrainConfig,
    model: LanguageModel | CachedModel,
    *,
    shards: FeatureShards | None = None,
) -> TrainingSAE:
    """The dictionary of a site before its first step, on the device of the site's layer; shards: how processes share
    out its features.
    """
    read = read_site(site, config)
    read_width = None if read == site else rows.widths[read]
    return TrainingSAE(
        name, site, rows.widths[site], config, model.device_of(site), read_width=read_width, shards=shards
    )


def export(sae: TrainingSAE, model: LanguageModel | CachedModel, rows: ActivationSource) -> SparseAutoencoder:
    """The trained autoencoder, with where its activations came from in its config."""
    site_path = model.moved_sites.get(sae.site, "")
    return sae.export(model=model.name, fingerprint=model.fingerprint, site_path=site_path, reading=rows.reading)


def open_activations(
    model: LanguageModel | CachedModel,
    source: TextSource,
    sites: Sequence[Site],
    config: TrainConfig,
    *,
    cache: CachedActivations | None,
) -> ActivationSource:
    """Activations for a trainer, of the sites and of what transcoders of them read: the cache if there is one, else
    forward passes of the model over the text.
    """
    reads = {read_site(site, config) for site in sites}
    if config.kind == "transcoder" and reads == {*sites}:
        raise UserError(f"kind is 'transcoder' and none of {', '.join(map(str, sites))} is an MLP: choose mlp sites")
    sites = sorted({*sites, *reads})
    if cache is not None:
        return cache.only(sites)
    if isinstance(model, CachedModel):
        raise UserError(f"the model {model.name!r} is known from a cache alone: give that cache as well, or load it")
    stream = ContextStream(model, source, context_length=config.context_length, packed=config.packed)
    stream.peek()  # text that cannot be read is told before anything is written
    return ModelActivations(model, stream, sites, exclude_special=config.exclude_special)


def rows_in_buffer(activations: ActivationSource, config: TrainConfig) -> int:
    """Tokens whose activations, of all sites in float32, are held at once."""
    wanted = min(config.buffer_tokens, config.tokens, BUFFER_BYTES // (4 * sum(activations.widths.values())))
    return max(wanted, MIN_BUFFER_TOKENS, config.batch, activations.rows_at_once)


def order_of_rows(seed: int, fill: int, n: int) -> Tensor:
    """The order [n] in which the rows of a fill of the buffer are dealt out."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(1_000_003 * seed + fill))


class Trainer(TrainingLoop):
    """Trains autoencoders on the activations of their sites, all from the same tokens."""

    unit, title, counters = "step", "train", ("fill", "dealt")

    def __init__(
        self,
        saes: Sequence[TrainingSAE],
        activations: ActivationSource,
        config: TrainConfig,
        run: RunFolder,
        *,
        progress: bool,
        processes: Processes | None = None,
    ):
        """processes: those that share the work; `saes` are this one's."""
        self.processes = processes or Processes()
        self.held = {site: sae.device for sae in saes for site in (sae.site, sae.read_site)}
        self.saes = [sae for sae in saes if sae.architecture.trained]
        self.activations, self.config, self.device = activations, config, saes[0].device
        self.batch, self.total = config.batch, config.steps
        workspaces = {sae.device: Workspace() for sae in self.saes}
        for sae in self.saes:
            sae.workspace = workspaces[sae.device]
        groups = [{"sae": sae, **group} for sae in self.saes for group in sae.groups()]
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.Adam(groups or [{"params": []}], betas=BETAS, fused=fused)
        super().__init__({sae.name: sae for sae in self.saes}, optimizer, config, run, progress=progress)
        self.fill = self.dealt = 0  # fills of the buffer, batches taken from the present one
        self.buffer: dict[Site, Tensor] = {}
        self.orders: dict[int, Tensor] = {}  # by seed, so that each autoencoder reads what it would read alone
        self.filled = 0
        self.logged_at, self.logged_step = time.monotonic(), 0

    def run(self) -> None:
        """Trains to the end, from the last checkpoint if there is one."""
        self._allocate()
        if self._restore():
            self._fill()
        else:
            self._prepare()
        if self.saes:
            self.logged_at, self.logged_step = time.monotonic(), self.step
            self._run_loop()

    def to_save(self, sae: TrainingSAE) -> TrainingSAE | None:
        """A trained autoencoder as it is saved by this process; None where another does."""
        return sae

    def _allocate(self) -> None:
        """The buffers of the sites that it needs, in float32; those of all sites are within the memory allowed."""
        size = rows_in_buffer(self.activations, self.config)
        self.buffer = {
            site: torch.empty(size, width, device=self.held[site])
            for site, width in self.activations.widths.items()
            if site in self.held
        }

    def _prepare(self) -> None:
        """Fills the buffer for the first time, and takes centre and scale of each site from it."""
        self._fill()
        for sae in self.saes:
            sae.prepare(self.buffer[sae.site][: self.filled], self.buffer[sae.read_site][: self.filled])

    def _fill(self) -> None:
        """Fills the buffer from the present position and deals the rows out in a new order."""
        self.activations.seek(self.position)
        self.filled = self.activations.fill(self.buffer)
        for seed in {sae.config.seed for sae in self.saes}:
            self.orders[seed] = order_of_rows(seed, self.fill, self.filled).to(self.device)

    def _next_rows(self) -> dict[int, Tensor]:
        """Rows of the buffer for the next batch [n], by seed; fills it again when fewer than a batch are left."""
        batch = self.batch
        if (self.dealt + 1) * batch > self.filled and self.dealt > 0:
            self.position = self.activations.position()
            self.fill, self.dealt = self.fill + 1, 0
            self._fill()
        dealt = slice(self.dealt * batch, (self.dealt + 1) * batch)
        self.dealt += 1
        return {seed: order[dealt] for seed, order in self.orders.items()}

    def _make_gradients(self) -> None:
        """Gradients of all autoencoders from the next batch."""
        rows = self._next_rows()
        casts = self.config.autocast and self.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if casts else nullcontext():
            for sae in self.saes:
                mine = rows[sae.config.seed].to(sae.device)
                x = self.buffer[sae.site][mine]
                if self.step in sae.resample_steps:
                    sae.resample(x, self.optimizer.state, self.step)
                x_read = None if sae.read_width is None else self.buffer[sae.read_site][mine]
                sae.step(x, self.step, x_read)

    def _one_step(self) -> None:
        self._make_gradients()
        if self.device.type == "cpu" or self.step % DEAD_LOOKS == 0:  # a look at a number waits for the device
            self._check_losses()
        for group in self.optimizer.param_groups:
            group["lr"] = group["factor"] * group["sae"].schedule.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for sae in self.saes:
            sae.constrain()
        self.step += 1

    def _check_losses(self) -> None:
        """`UserError` where a loss since the last line of the log is not finite."""
        finite = torch.stack([sae.state["loss"].to(self.device) for sae in self.saes]).isfinite()
        if not finite.all():
            raise diverged(self.saes[int((~finite).nonzero()[0])].name, self.step, self.files.checkpoints)

    def _log(self, lines: TextIO) -> str:
        now, tokens = time.monotonic(), (self.step - self.logged_step) * self.batch
        speed = tokens / max(now - self.logged_at, 1e-9)
        self.logged_at, self.logged_step = now, self.step
        mine: dict[str, dict[str, Any]] = {}
        for sae in self.saes:
            line = {"step": self.step, "tokens": self.step * self.batch, "site": sae.name, **sae.report()}
            line |= {"learning_rate": sae.schedule.learning_rate(self.step - 1), "tokens_per_second": round(speed)}
            mine[sae.name] = line | {"epoch": self.activations.position().epoch}
        of_all = {name: line for of_process in self.processes.gathered(mine) for name, line in of_process.items()}
        lines.writelines(json.dumps(line) + "\n" for line in of_all.values())
        self.explained = {name: line["explained_variance"] for name, line in of_all.items()}
        shared = ("loss", "l0", "explained_variance", "dead")  # what every architecture reports
        mean = {key: sum(line[key] for line in of_all.values()) / len(of_all) for key in shared}
        named = f"loss {mean['loss']:.3f}, L0 {mean['l0']:.1f}, explained {mean['explained_variance']:.3f}"
        return f"{named}, dead {mean['dead']:.2f}, {speed:,.0f} tokens/s"
