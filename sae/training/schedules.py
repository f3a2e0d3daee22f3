"""How a run changes what a training step does, as functions of the step.

1. The learning rate rises linearly over the warm-up and falls linearly to zero over the last steps.
2. The weight of the sparsity penalty rises over the warm-up; k may fall meanwhile; p-annealing's exponent falls all
   along.
3. Where nothing but a penalty decides how many features are active, its weight λ is steered to L0 = k:
   log λ changes by speed · log(L0 / k) + damping · (change of log L0) at each step. The second term lets go of a weight
   that is already about to do its work, so that short runs may be steered fast.
"""

from __future__ import annotations

import math

from torch import Tensor

from sae.architectures import architecture
from sae.architectures.base import Hyper
from sae.training.config import TrainConfig

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
