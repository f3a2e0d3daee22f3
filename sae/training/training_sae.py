"""One autoencoder while it is trained: weights, counters, schedules; the same for all architectures.

1. Decoder rows start random with unit norm, the encoder as their transpose, biases at zero. Where half of all features
   are active at first, the encoder is scaled down so that x̂ is not larger than x (`_initial_encoder`). `prepare`
   measures a centre c (mean or geometric median) and a scale s = √(mean ‖x − c‖²); from then on inputs are (x − c) / s.
2. `step` makes gradients of one batch and updates counters: tokens since each feature was active, sums for the log.
   Dead features are woken meanwhile: their encoder biases rise until they are active, in place of being learned. AuxK
   turns a dead feature towards the error; its bias would sink, since whatever is forced to be active overshoots, and
   ever fewer tokens could wake it.
3. `constrain`, after the optimizer, holds decoder rows at unit norm where the architecture wants that.
4. `export` folds c, s and decoder norms into a `SparseAutoencoder` that works on raw activations.

`Schedule` says how a run changes what a step does, as functions of the step:

1. The learning rate rises linearly over the warm-up and falls linearly to zero over the last steps.
2. The weight of the sparsity penalty rises over the warm-up; k may fall meanwhile; p-annealing's exponent falls all
   along.
3. Where nothing but a penalty decides how many features are active, its weight λ is steered to L0 = k:
   log λ changes by speed · log(L0 / k) + damping · (change of log L0) at each step. The second term lets go of a weight
   that is already about to do its work, so that short runs may be steered fast.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from sae.activation_functions import TOPK
from sae.architectures import architecture
from sae.architectures.base import WHOLE, Hyper, StepStats
from sae.autoencoder import SITE_PATH, SAEConfig, SparseAutoencoder
from sae.folding import fold_norms, fold_reading, fold_scale
from sae.model.sites import Site
from sae.sparse.activations import normalize_rows_, remove_parallel_
from sae.sparse.encoder_pass import Workspace
from sae.sparse.shards import FeatureShards
from sae.training.config import TrainConfig
from sae.training.dead_features import RESAMPLE_AT, RESAMPLED_ENCODER, resample

DENSE_ABOVE = 0.1
"""Share of active features above which the dense step is faster."""
DEAD_LOOKS = 16
"""Steps between two looks at which features are dead, on a device that the host would have to wait for."""
MEDIAN_STEPS = 30
"""Weiszfeld iterations of the geometric median."""
WAKING = 0.2
"""Rise of a dead feature's encoder bias a step, as a share of the learning rate."""
RATE_STEPS = 1000
"""Steps of a run to which the default learning rates belong; others take it times √(1000 / steps)."""
FEWEST_RATE_STEPS = 250
"""Steps below which the default learning rate rises no more."""
FIRST_SPARSITY = 0.01
"""Weight of a steered sparsity penalty at the start."""
STEERING = 9.0
"""Speed of steering, as a factor over the whole run."""
SLOWEST_STEERING, FASTEST_STEERING = 0.03, 0.1
"""Bounds of that speed at each step."""
FARTHEST = 3.0
"""The largest |log(L0 / k)| that counts."""
LARGEST_CHANGE = 0.3
"""Largest change of the logarithm of that weight a step."""
TRANSCODER_RATE = 2.0
"""Factor on the usual learning rate of a transcoder with k active features: its decoder has a way to go from zero."""
BANDWIDTH = 0.8
"""JumpReLU's bandwidth in units of 1/√width, the spread of a random direction's pre-activations."""


class Schedule:
    """The schedules of one autoencoder."""

    def __init__(self, config: TrainConfig, width: int, *, transcoder: bool = False) -> None:
        self.config, self.width, self.steps = config, width, config.steps
        self.architecture = architecture(config.architecture)
        self.rate_factor = TRANSCODER_RATE if transcoder and self.architecture.fixed_k else 1.0
        self.n_features = config.features if self.architecture.trained else width
        revival = self.architecture.revival if config.revival == "auto" else config.revival
        self.k_aux = config.k_aux if revival == "auxk" else 0
        self.target_l0 = float(config.k) if config.architecture == "jumprelu" and config.l0_loss == "target" else None
        self.steered = not self.architecture.fixed_k and config.sparsity is None and self.target_l0 is None
        self.bandwidth = config.bandwidth or BANDWIDTH / math.sqrt(width)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        config, steps = self.config, self.steps
        decay = self.architecture.decay if config.decay is None else config.decay
        usual = self.architecture.learning_rate / math.sqrt(self.width * max(steps, FEWEST_RATE_STEPS) / RATE_STEPS)
        rise = min(1.0, (step + 1) / max(1.0, config.warmup * steps))
        fall = min(1.0, (steps - step) / max(1.0, decay * steps))
        return (config.learning_rate or usual * self.rate_factor) * rise * fall

    def first_sparsity(self) -> float:
        """Weight of the penalty at the start, before its warm-up."""
        if self.config.sparsity is not None:
            return self.config.sparsity
        return FIRST_SPARSITY if self.target_l0 is None else 1.0

    def hyper(self, step: int, sparsity: Tensor) -> Hyper:
        """The hyperparameters of step 0, 1, ..., from the weight of the penalty, a scalar."""
        config = self.config
        progress = step / self.steps
        rise = min(1.0, progress / config.warmup) if config.warmup else 1.0
        k = config.k if config.k_start is None else round(config.k_start + rise * (config.k - config.k_start))
        return Hyper(
            k=min(k, self.n_features),
            sparsity=sparsity * rise,
            p=1 + (config.p_end - 1) * progress,
            bandwidth=self.bandwidth,
            target_l0=self.target_l0,
            k_aux=self.k_aux,
            aux_alpha=config.aux_alpha,
        )

    def steering(self, previous_l0: Tensor, l0: Tensor, exponent_fall: float) -> Tensor:
        """Factor on the penalty's weight from L0 of a batch and of the one before, scalars.

        Where the exponent of the penalty falls, the weight keeps what an activation of the architecture's `weak` pays.
        """
        lowest = 1e-3 * self.config.k
        then, now = previous_l0.clamp(min=lowest).log(), l0.clamp(min=lowest).log()
        off = (now - math.log(self.config.k)).clamp(-FARTHEST, FARTHEST)
        speed = min(max(STEERING / self.steps, SLOWEST_STEERING), FASTEST_STEERING)
        change = (speed * off + self.architecture.damping * (now - then)).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
        return (change + exponent_fall * math.log(self.architecture.weak)).exp()


class TrainingSAE:
    """The training state of one autoencoder at one site."""

    def __init__(
        self,
        name: str,
        site: Site,
        width: int,
        config: TrainConfig,
        device: torch.device,
        *,
        read_width: int | None = None,
        shards: FeatureShards | None = None,
    ):
        """read_width: of what a transcoder reads; None for an autoencoder. shards: how processes share out its
        features; None where all are here.
        """
        self.read_width, self.shards = read_width, shards
        self.read_site = site if read_width is None else Site(config.read, site.layer)
        self.name, self.site, self.width, self.config, self.device = name, site, width, config, device
        self.architecture, self.schedule = (
            architecture(config.architecture),
            Schedule(config, width, transcoder=read_width is not None),
        )
        self.n_all, self.dead_after = self.schedule.n_features, config.dead_after
        self.n_features = self.n_all if shards is None else self.n_all // shards.processes.size
        self.resample_steps = (
            {round(share * config.steps) for share in RESAMPLE_AT} if config.revival == "resample" else set()
        )
        self.weights = {key: tensor.requires_grad_() for key, tensor in self._initial().items()}
        extra = {key: tensor.to(device) for key, tensor in self.architecture.extra_state().items()}
        self.extra_state: dict[str, Tensor] = extra  # the architecture's own
        self.state: dict[str, Tensor] = {
            "centre": torch.zeros(width),
            "scale": torch.ones(()),
            "silent": torch.zeros(self.n_features),  # tokens since each feature was active
            "sparsity": torch.tensor(self.schedule.first_sparsity()),
            "l0": torch.tensor(float(self.n_all)),  # of the last batch
            "loss": torch.zeros(()),
            "squared_error": torch.zeros(()),
            "active": torch.zeros(()),
            "sum_x": torch.zeros(width),
            "sum_x2": torch.zeros(()),
            "n_tokens": torch.zeros(()),
        }
        if read_width is not None:
            self.state |= {"read_centre": torch.zeros(read_width), "read_scale": torch.ones(())}
        self.state = {key: tensor.to(device) for key, tensor in self.state.items()}
        self.state |= {f"extra.{key}": tensor for key, tensor in extra.items()}
        self.dead: Tensor | None = None  # of the features here, and how many there are of all
        self.n_dead = 0
        self.workspace = Workspace()
        self.share = WHOLE

    @property
    def unit_decoder(self) -> bool:
        """Whether decoder rows are held at unit norm."""
        return self.architecture.unit_decoder and self.read_width is None

    def _initial(self) -> dict[str, Tensor]:
        seed = zlib.crc32(f"{self.config.seed} {self.site}".encode())
        generator = torch.Generator().manual_seed(seed)
        if self.architecture.trained:
            rows = torch.randn(self.n_all, self.read_width or self.width, generator=generator)
            rows = rows if self.shards is None else self.shards.mine(rows).clone()
            rows *= self.architecture.decoder_norm / rows.norm(dim=1, keepdim=True)
        else:
            rows = torch.eye(self.width)
        tensors = {"W_enc": rows * self._initial_encoder(), "b_enc": torch.zeros(self.n_features)}
        tensors |= {"W_dec": rows.clone(), "b_dec": torch.zeros(self.width)} | self.architecture.extra_weights(
            self.n_features
        )
        if self.read_width is not None:  # what it reads says nothing of the directions it has to write
            tensors["W_dec"] = torch.zeros(self.n_features, self.width)
            tensors |= {"W_skip": torch.zeros(self.width, self.read_width)} if self.config.skip else {}
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def _initial_encoder(self) -> float:
        """Norm of encoder rows relative to decoder rows at the start.

        With half of F random unit features active, x̂ = ½ Σ_i (d_i · x) d_i is F / 2d times x on average. Where nothing
        but the penalty holds the number of features down, all of them would be pushed back at once and many for good.
        """
        if self.architecture.fixed_k or self.architecture.decoder_norm < 1:
            return 1.0
        return min(1.0, 2 * self.width / self.n_all)

    def prepare(self, x: Tensor, x_read: Tensor | None = None) -> None:
        """Centre and scale from activations x [n, d], and from what a transcoder reads [n, r]."""
        x = x.float()
        if x_read is not None and self.read_width is not None:
            read_centre = x_read.float().mean(0)
            self.state["read_centre"].copy_(read_centre)
            size = (x_read.float() - read_centre).square().sum(1).mean().sqrt()
            self.state["read_scale"].copy_(size.clamp(min=1e-6))
        if self.config.centre == "zero" or not self.architecture.trained:
            centre = torch.zeros_like(x[0])
        else:
            centre = x.mean(0) if self.config.centre == "mean" else geometric_median(x)
        self.state["centre"].copy_(centre)
        if self.architecture.trained:
            self.state["scale"].copy_((x - centre).square().sum(1).mean().sqrt().clamp(min=1e-6))

    def step(self, x: Tensor, step: int, x_read: Tensor | None = None) -> None:
        """Makes the gradients of step 0, 1, ... from a batch x [n, d] of raw activations, with what a transcoder reads
        [n, r], and counts.
        """
        state = self.state
        x = (x - state["centre"]) / state["scale"]
        if x_read is not None and self.read_width is not None:
            x_read = (x_read - state["read_centre"]) / state["read_scale"]
        dense = not self.architecture.fixed_k and state["l0"].item() > DENSE_ABOVE * self.n_all
        if self.schedule.k_aux and (step % DEAD_LOOKS == 0 or x.device.type == "cpu"):
            self._find_dead()
        hyper = self.schedule.hyper(step, state["sparsity"])
        if self.shards is not None:  # which know of their own dead features alone
            hyper = replace(hyper, k_aux=min(hyper.k_aux, self.n_dead))
        stats = self.architecture.step(
            x, self.weights, hyper, self.extra_state, dead=self.dead, dense=dense, workspace=self.workspace,
            x_read=x_read, share=self.share, shards=self.shards,
        )  # fmt: skip
        previous_l0 = state["l0"].clone()
        self._count(x, stats)
        if not self.architecture.fixed_k:
            self._adjust_penalty(x if x_read is None else x_read, step, hyper, previous_l0)
        rows, bias = self.weights["W_dec"], self.architecture.bias(self.weights)
        if self.unit_decoder and rows.grad is not None:
            with torch.no_grad():  # the part along the rows would only change their norm
                remove_parallel_(rows.grad, rows)
        if self.dead is not None and bias is not None:
            with torch.no_grad():
                bias[self.dead] += WAKING * self.schedule.learning_rate(step)
            if bias.grad is not None:
                bias.grad[self.dead] = 0

    def _count(self, x: Tensor, stats: StepStats) -> None:
        """Takes a batch of scaled activations x [n, d] into the counters."""
        state, n_tokens = self.state, torch.full((), float(len(x)), device=x.device)  # a copy would be waited for
        fired, loss, squared_error, sum_x, sum_x2, n_tokens = self.share.sums(
            stats.fired, stats.loss, stats.squared_error, x.sum(0), x.square().sum(), n_tokens
        )
        active = self._over_all_features(fired.sum())
        state["silent"].add_(n_tokens).mul_(fired == 0)
        state["l0"].copy_(active / n_tokens)
        state["loss"].add_(loss)
        state["squared_error"].add_(squared_error)
        state["active"].add_(active)
        state["sum_x"].add_(sum_x)
        state["sum_x2"].add_(sum_x2)
        state["n_tokens"].add_(n_tokens)

    def _adjust_penalty(self, x: Tensor, step: int, hyper: Hyper, previous_l0: Tensor) -> None:
        """Steers the weight of the penalty, or rescales a fixed one to the penalty of the next step."""
        following = self.schedule.hyper(step + 1, self.state["sparsity"])
        if self.schedule.steered:
            factor: Tensor | float = self.schedule.steering(previous_l0, self.state["l0"], hyper.p - following.p)
        elif self.config.sparsity is not None:
            weights: dict[str, Tensor] = self.weights
            if self.read_width is not None:  # nothing is subtracted from what is read
                weights = weights | {"b_dec": torch.zeros_like(self.state["read_centre"])}
            factor = self.architecture.rescaling(x, weights, hyper, following)
        else:
            return
        self.state["sparsity"].mul_(factor)

    def _find_dead(self) -> None:
        dead = (self.state["silent"] > self.dead_after).nonzero().squeeze(1)
        self.n_dead = len(dead) if self.shards is None else sum(self.shards.processes.gathered(len(dead)))
        self.dead = dead if self.n_dead else None

    def _over_all_features(self, x: Tensor) -> Tensor:
        """A sum over all features from that over the features here."""
        return x if self.shards is None else self.shards.over_all_features(x)

    def groups(self) -> list[dict[str, Any]]:
        """Groups of weights for the optimizer, by the factor on their learning rate."""
        factors = {key: self.architecture.rates.get(key, 1.0) for key in self.weights}
        return [
            {"params": [self.weights[key] for key in factors if factors[key] == factor], "factor": factor}
            for factor in sorted(set(factors.values()), reverse=True)
        ]

    @torch.no_grad()
    def constrain(self) -> None:
        """Restores what must hold after each optimizer step: unit decoder rows, weights in their ranges.

        A transcoder's rows start at zero and are at most as long: else a penalty on activations would make rows long
        in place of activations sparse.
        """
        rows = self.weights["W_dec"]
        if self.unit_decoder:
            normalize_rows_(rows)
        elif self.architecture.unit_decoder:
            rows.div_(rows.norm(dim=1, keepdim=True).clamp(min=1.0))
        self.architecture.constrain(self.weights)

    @torch.no_grad()
    def resample(self, x: Tensor, moments: Mapping[Tensor, Mapping[str, Any]], step: int) -> None:
        """New rows for the dead features, from a batch x [n, d] of raw activations (`dead_features`)."""
        dead = (self.state["silent"] > self.dead_after).nonzero().squeeze(1)
        if len(dead):
            error = (x - self.export()(x)) / self.state["scale"]
            share = 1.0 if self.architecture.fixed_k else RESAMPLED_ENCODER
            resample(self.weights, moments, dead, error, share=share, seed=1_000_003 * self.config.seed + step)
            self.state["silent"][dead] = 0

    def report(self) -> dict[str, float]:
        """Means since the last report: loss, L0, explained variance, dead fraction; the sums start over."""
        state = self.state
        n = state["n_tokens"].clamp(min=1)
        variance = state["sum_x2"] - state["sum_x"].square().sum() / n
        values = torch.stack([
            state["loss"] / n,
            state["active"] / n,
            1 - state["squared_error"] / variance.clamp(min=1e-12),
            self._over_all_features((state["silent"] > self.dead_after).sum()) / self.n_all,
            state["sparsity"],
        ]).tolist()  # fmt: skip
        for key in ("loss", "squared_error", "active", "sum_x", "sum_x2", "n_tokens"):
            state[key].zero_()
        report = dict(zip(("loss", "l0", "explained_variance", "dead", "sparsity"), values, strict=True))
        if self.architecture.fixed_k:
            del report["sparsity"]
        return report

    def export(
        self, *, model: str = "", fingerprint: str = "", site_path: str = "", reading: Mapping[str, Any] | None = None
    ) -> SparseAutoencoder:
        """The autoencoder on raw activations: scale, centre and decoder norms folded in.

        `site_path` says where the site is, if not where the model's architecture has it; `reading` how text was read.
        """
        architecture, scale = self.architecture, self.state["scale"].item()
        exported = architecture.export(self.weights, self.extra_state)
        tensors = {key: tensor.clone() for key, tensor in exported.items()}
        tensors = fold_scale(tensors, scale)
        if self.read_width is not None:
            tensors = fold_reading(tensors, self.state["read_centre"], scale / self.state["read_scale"].item())
        if not self.unit_decoder:
            tensors = fold_norms(tensors, ranked=architecture.nonlinearity.name == TOPK.name)
        if self.read_width is None and not architecture.subtract_b_dec:
            tensors["b_enc"] = tensors["b_enc"] - tensors["W_enc"] @ self.state["centre"]
        tensors["b_dec"] = tensors["b_dec"] + self.state["centre"]
        config = SAEConfig(
            architecture=architecture.name,
            d_model=self.width,
            n_features=self.n_features,
            site=self.site.name,
            model=model,
            model_fingerprint=fingerprint,
            subtract_b_dec=architecture.subtract_b_dec and self.read_width is None,
            read=self.config.read if self.read_width is not None else "",
            d_read=None if self.read_width in (None, self.width) else self.read_width,
            k=self.config.k if architecture.fixed_k and architecture.trained else None,
            extra={"training": asdict(self.config), SITE_PATH: site_path, **(reading or {})},
        )
        return SparseAutoencoder(config, tensors)


def geometric_median(x: Tensor, *, steps: int = MEDIAN_STEPS) -> Tensor:
    """argmin_c Σ ‖x_t − c‖ [d] of x [n, d], by Weiszfeld's iteration from the mean."""
    centre = x.mean(0)
    for _ in range(steps):
        weight = 1 / (x - centre).norm(dim=1).clamp(min=1e-6)  # [n]
        centre = weight @ x / weight.sum()
    return centre
