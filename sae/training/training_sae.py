"""One autoencoder while it is trained: weights, counters, schedules. What all architectures share exists here once.

1. Decoder rows start random with unit norm, the encoder as their transpose, biases at zero. Where half of all features
   are active at first, the encoder is scaled down so that x̂ is not larger than x (`_initial_encoder`). `prepare`
   measures a centre c (mean or geometric median) and a scale s = √(mean ‖x − c‖²); from then on inputs are (x − c) / s.
2. `step` makes gradients of one batch and updates counters: tokens since each feature was active, sums for the log, and
   the weight of the sparsity penalty, which rises while more than k features are active and falls while fewer are.
   Biases of dead features rise meanwhile, until they are active.
3. `constrain`, after the optimizer, holds decoder rows at unit norm where the architecture wants that.
4. `export` folds c, s and decoder norms into a `SparseAutoencoder` that works on raw activations.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from sae.activation_functions import TOPK
from sae.architectures import architecture
from sae.architectures.base import Hyper
from sae.autoencoder import SITE_PATH, SAEConfig, SparseAutoencoder
from sae.folding import fold_norms, fold_scale
from sae.model.sites import Site
from sae.sparse.rows import normalize_rows_, remove_parallel_
from sae.sparse.workspace import Workspace
from sae.training.config import TrainConfig
from sae.training.dead_features import resample

DENSE_ABOVE = 0.1
"""Share of active features above which the dense step is faster."""
FIRST_SPARSITY = 0.01
"""Weight of a steered sparsity penalty at the start."""
STEERING = 9.0
"""How fast that weight follows log(L0 / k), as a factor over the whole run, ..."""
STEERING_A_STEP = 0.03, 0.1
"""... but by no less and no more than this at each step."""
FARTHEST = 3.0
"""The largest |log(L0 / k)| that counts."""
LARGEST_CHANGE = 0.3
"""Largest change of the logarithm of that weight a step."""
DEAD_LOOKS = 16
"""Steps between two looks at which features are dead."""
BANDWIDTH = 0.8
"""JumpReLU's bandwidth in units of 1/√width, the spread of a random direction's pre-activations."""
WAKING = 0.2
"""Rise of a dead feature's encoder bias a step, as a share of the learning rate."""
RESAMPLE_AT = (0.1, 0.2, 0.3, 0.4)
"""Shares of the run after which dead features are resampled, where that is asked for."""
RESAMPLED_ENCODER = 0.2
"""Norm of a resampled encoder row, relative to the living ones; 1 where features compete for k places."""
MEDIAN_STEPS = 30
"""Weiszfeld iterations of the geometric median."""


class TrainingSAE:
    """The training state of one autoencoder at one site."""

    def __init__(self, name: str, site: Site, width: int, config: TrainConfig, device: torch.device):
        self.name, self.site, self.width, self.config, self.device = name, site, width, config, device
        self.recipe = architecture(config.architecture)
        self.n_features = config.features if self.recipe.trained else width
        revival = self.recipe.revival if config.revival == "auto" else config.revival
        self.k_aux = config.k_aux if revival == "auxk" else 0
        self.targets_l0 = config.architecture == "jumprelu" and config.l0_loss == "target"
        self.resample_steps = {round(at * config.steps) for at in RESAMPLE_AT} if revival == "resample" else set()
        self.weights = {key: tensor.requires_grad_() for key, tensor in self._initial().items()}
        self.state: dict[str, Tensor] = {
            "centre": torch.zeros(width),
            "scale": torch.ones(()),
            "silent": torch.zeros(self.n_features),  # tokens since each feature was active
            "sparsity": torch.tensor(self._first_sparsity()),
            "l0": torch.tensor(float(self.n_features)),  # of the last batch
            "loss": torch.zeros(()),
            "squared_error": torch.zeros(()),
            "active": torch.zeros(()),
            "sum_x": torch.zeros(width),
            "sum_x2": torch.zeros(()),
            "n_tokens": torch.zeros(()),
        }
        self.state |= {f"own.{key}": tensor for key, tensor in self.recipe.own_state().items()}
        self.state = {key: tensor.to(device) for key, tensor in self.state.items()}
        self.dead: Tensor | None = None
        self.scratch = Workspace()

    def _first_sparsity(self) -> float:
        if self.config.sparsity is not None:
            return self.config.sparsity
        return 1.0 if self.targets_l0 else FIRST_SPARSITY

    def _initial(self) -> dict[str, Tensor]:
        seed = zlib.crc32(f"{self.config.seed} {self.site}".encode())
        generator = torch.Generator().manual_seed(seed)
        if self.recipe.trained:
            rows = torch.randn(self.n_features, self.width, generator=generator)
            rows *= self.recipe.decoder_norm / rows.norm(dim=1, keepdim=True)
        else:
            rows = torch.eye(self.width)
        tensors = {"W_enc": rows * self._initial_encoder(), "b_enc": torch.zeros(self.n_features)}
        tensors |= {"W_dec": rows.clone(), "b_dec": torch.zeros(self.width)} | self.recipe.own_weights(self.n_features)
        return {key: tensor.to(self.device) for key, tensor in tensors.items()}

    def _initial_encoder(self) -> float:
        """Norm of encoder rows relative to decoder rows at the start.

        With half of F random unit features active, x̂ = ½ Σ_i (d_i · x) d_i is F / 2d times x on average. Where nothing
        but the penalty holds the number of features down, all of them would be pushed back at once and many for good.
        """
        if self.recipe.fixed_k or self.recipe.decoder_norm < 1:
            return 1.0
        return min(1.0, 2 * self.width / self.n_features)

    def prepare(self, x: Tensor) -> None:
        """Centre and scale from activations x [n, d]."""
        x = x.float()
        if self.config.centre == "zero" or not self.recipe.trained:
            centre = torch.zeros_like(x[0])
        else:
            centre = x.mean(0) if self.config.centre == "mean" else geometric_median(x)
        self.state["centre"].copy_(centre)
        if self.recipe.trained:
            self.state["scale"].copy_((x - centre).square().sum(1).mean().sqrt().clamp(min=1e-6))

    def hyper(self, step: int) -> Hyper:
        """The hyperparameters of step 0, 1, ..."""
        config = self.config
        progress = step / config.steps
        rise = min(1.0, progress / config.warmup) if config.warmup else 1.0
        k = config.k if config.k_start is None else round(config.k_start + rise * (config.k - config.k_start))
        return Hyper(
            k=min(k, self.n_features),
            sparsity=self.state["sparsity"] * rise,
            p=1 + (config.p_end - 1) * progress,
            bandwidth=config.bandwidth or BANDWIDTH / math.sqrt(self.width),
            target_l0=float(config.k) if self.targets_l0 else None,
            k_aux=self.k_aux,
            aux_alpha=config.aux_alpha,
        )

    def step(self, x: Tensor, step: int) -> None:
        """Gradients of a batch x [n, d] of raw activations, and everything that is counted."""
        state = self.state
        x = (x - state["centre"]) / state["scale"]
        own = {key.removeprefix("own."): tensor for key, tensor in state.items() if key.startswith("own.")}
        dense = self.recipe.may_be_dense and state["l0"].item() > DENSE_ABOVE * self.n_features
        if self.k_aux and (step % DEAD_LOOKS == 0 or x.device.type == "cpu"):
            self._find_dead()
        hyper = self.hyper(step)
        stats = self.recipe.step(x, self.weights, hyper, own, dead=self.dead, dense=dense, scratch=self.scratch)
        state["silent"].add_(len(x)).mul_(stats.fired == 0)
        before = state["l0"].clone()
        state["l0"].copy_(stats.fired.sum() / len(x))
        if not self.recipe.fixed_k and self.config.sparsity is None and not self.targets_l0:
            self._steer(before, hyper.p - self.hyper(step + 1).p)
        if self.config.sparsity is not None:
            state["sparsity"].mul_(self.recipe.rescaling(x, self.weights, hyper, self.hyper(step + 1)))
        for key, value in (
            ("loss", stats.loss), ("squared_error", stats.squared_error), ("active", stats.fired.sum()),
            ("sum_x", x.sum(0)), ("sum_x2", x.square().sum()), ("n_tokens", len(x)),
        ):  # fmt: skip
            state[key].add_(value)
        self._project()
        self._wake(self.config.learning_rate_at(step, self.width))

    def _steer(self, before: Tensor, fall: float) -> None:
        """Weight of the sparsity penalty from L0 of this batch and the one before; `fall` is that of its exponent.

        log λ changes by speed · log(L0 / k) + damping · (change of log L0): the second term lets go of a weight that is
        already about to do its work, so that short runs may be steered fast.
        """
        lowest = 1e-3 * self.config.k
        then, now = before.clamp(min=lowest).log(), self.state["l0"].clamp(min=lowest).log()
        off = (now - math.log(self.config.k)).clamp(-FARTHEST, FARTHEST)
        speed = min(max(STEERING / self.config.steps, STEERING_A_STEP[0]), STEERING_A_STEP[1])
        change = (speed * off + self.recipe.damping * (now - then)).clamp(-LARGEST_CHANGE, LARGEST_CHANGE)
        self.state["sparsity"].mul_((change + fall * math.log(self.recipe.weak)).exp())

    def _find_dead(self) -> None:
        dead = (self.state["silent"] > self.config.dead_after).nonzero().squeeze(1)
        self.dead = dead if len(dead) else None

    @torch.no_grad()
    def _project(self) -> None:
        """Takes the part of the decoder's gradient along its rows away: it would only change their norm."""
        rows = self.weights["W_dec"]
        if self.recipe.unit_decoder and rows.grad is not None:
            remove_parallel_(rows.grad, rows)

    @torch.no_grad()
    def _wake(self, rate: float) -> None:
        """Raises the encoder biases of dead features until they are active, in place of learning them.

        AuxK turns a dead feature towards the error. Its bias would sink meanwhile, since whatever is forced to be
        active overshoots: ever fewer tokens could wake it.
        """
        if self.dead is not None and self.recipe.encoder_bias is not None:
            bias = self.weights[self.recipe.encoder_bias]
            bias[self.dead] += WAKING * rate
            if bias.grad is not None:
                bias.grad[self.dead] = 0

    def groups(self) -> list[dict[str, Any]]:
        """Groups of weights for the optimizer, by the factor on their learning rate."""
        factors = {key: self.recipe.rates.get(key, 1.0) for key in self.weights}
        return [
            {"params": [self.weights[key] for key in factors if factors[key] == factor], "factor": factor}
            for factor in sorted(set(factors.values()), reverse=True)
        ]

    @torch.no_grad()
    def constrain(self) -> None:
        """What must hold after each optimizer step."""
        rows = self.weights["W_dec"]
        if self.recipe.unit_decoder:
            normalize_rows_(rows)
        self.recipe.constrain(self.weights)

    @torch.no_grad()
    def resample(self, x: Tensor, moments: Mapping[Tensor, Mapping[str, Any]], step: int) -> None:
        """New rows for the dead features, from a batch x [n, d] of raw activations (`dead_features`)."""
        dead = (self.state["silent"] > self.config.dead_after).nonzero().squeeze(1)
        if len(dead):
            error = (x - self.export()(x)) / self.state["scale"]
            share = 1.0 if self.recipe.fixed_k else RESAMPLED_ENCODER
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
            (state["silent"] > self.config.dead_after).float().mean(),
            state["sparsity"],
        ]).tolist()  # fmt: skip
        for key in ("loss", "squared_error", "active", "sum_x", "sum_x2", "n_tokens"):
            state[key].zero_()
        report = dict(zip(("loss", "l0", "explained_variance", "dead", "sparsity"), values, strict=True))
        if self.recipe.fixed_k:
            del report["sparsity"]
        return report

    def export(
        self, *, model: str = "", fingerprint: str = "", site_path: str = "", reading: Mapping[str, Any] | None = None
    ) -> SparseAutoencoder:
        """The autoencoder on raw activations: scale, centre and decoder norms folded in.

        `site_path` says where the site is, if not where the model's architecture has it; `reading` how text was read.
        """
        recipe, scale = self.recipe, self.state["scale"].item()
        own = {key.removeprefix("own."): tensor for key, tensor in self.state.items() if key.startswith("own.")}
        tensors = {key: tensor.clone() for key, tensor in recipe.export(self.weights, own).items()}
        tensors = fold_scale(tensors, scale)
        if not recipe.unit_decoder:
            tensors = fold_norms(tensors, ranked=recipe.nonlinearity.name == TOPK.name)
        if not recipe.subtract_b_dec:
            tensors["b_enc"] = tensors["b_enc"] - tensors["W_enc"] @ self.state["centre"]
        tensors["b_dec"] = tensors["b_dec"] + self.state["centre"]
        config = SAEConfig(
            architecture=recipe.name,
            d_model=self.width,
            n_features=self.n_features,
            site=self.site.name,
            model=model,
            model_fingerprint=fingerprint,
            subtract_b_dec=recipe.subtract_b_dec,
            k=self.config.k if recipe.fixed_k and recipe.trained else None,
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
