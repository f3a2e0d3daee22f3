"""The options of training, with the defaults and how they were chosen.

Defaults were chosen on the 16 sites of a small trained model (width 64, F = 512 and 1024, k = 16, 400k tokens of
stories) and on synthetic data with known directions at widths 128 and 512, so that none needs tuning at another size:

- `learning_rate` and `decay`: a peak of 0.048 / √width for the TopK family, which is the same change relative to the
  size of a weight (rows have unit norm) at any width, times √(1000 / steps), at most 2; it falls over the last .6 of
  the steps. Features die all along while the rate is high and come back while it falls: at attn_2 (F = 1024, 262k
  tokens) a peak of .064 that falls over the last .3 explains .004 more and leaves three times as many dead; at 4096
  steps, without the factor, nearly all. Runs of 195 steps explain .03 more at twice the rate. Where a penalty makes
  features sparse, .064 and .3 explain up to .03 more.
- Dead features: AuxK with k / 8 of them a token and not half the width, so that each explains as much of the error as
  active features do and wins a place; and biases of dead features are not learned but rise by a fifth of the rate a
  step, for with AuxK alone they sink out of reach. Together, at F = 1024: .02 dead instead of .60 at attn_2, none at
  mlp_2; at F = 4096: .10 and .02 instead of .69 and .67 at resid_2 and mlp_2, with .010 and .021 more explained.
  What did not help: initial rows from data, raising biases at once, Adam that only moves active rows, resampling,
  other weights than AuxK's 1/32, k annealing. Attention sites have the most: their activations spread over few
  dimensions (participation ratio of the eigenvalues 17 to 20 of 64), and 256 features explain attn_2 as well as 1024.
- `batch_size`: at least a thousand steps, between 512 and 4096 tokens. Small batches reach the same explained
  variance with fewer tokens; large ones use the machine better once tokens are plenty.
- Adam's second moment decays with .99: .999 remembers the large gradients of the start too long.
- Sparsity penalties have no weight to tune: it follows L0, which is brought to k. On 40k, 100k, 262k and 400k tokens
  of resid_2 (F = 512, 1024) every architecture ends within .09 of k; speed and damping
  (`sae/training/training_sae.py`) were chosen there.
- Where only a penalty holds the number of features down, the encoder starts 2 width / F times as large as the decoder:
  with both of unit norm x̂ is F / (2 width) times x at first, and most features die while that is undone (262k tokens,
  F = 1024, resid_2: Gated .77 dead and .83 explained instead of .02 and .95). At attn_2, .04 more is explained by
  JumpReLU and .02 by Gated, with more dead features (.7 and .6, as many as TopK leaves there).
- JumpReLU's thresholds learn at .3 of the rate (`sae/architectures/jumprelu.py`): a third of the dead features at the
  same explained variance; at .1, fewer still, but L0 arrives late. The quadratic penalty around a wanted L0 with
  weight 1 (`l0_loss` target) loses .01 of explained variance to the steered one and leaves more features dead, and
  with weight .1 it misses the wanted L0 by a quarter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, get_args

from sae._options import (
    BatchSize,
    ContextLength,
    FeatureCount,
    LearningRate,
    Positive,
    Range,
    Repeats,
    Seed,
    Share,
    TokenCount,
    Weight,
    check_options,
)
from sae.errors import UserError

if TYPE_CHECKING:
    from sae.data.cache import CachedActivations

ArchitectureName = Literal[
    "topk", "relu", "batchtopk", "jumprelu", "gated", "multi_topk", "matryoshka", "relu_unit", "p_anneal", "identity"
]
ARCHITECTURE_NAMES: tuple[ArchitectureName, ...] = get_args(ArchitectureName)
RATE_STEPS = 1000
"""Steps of a run to which the default learning rates belong; others take it times √(1000 / steps)."""
FEWEST_RATE_STEPS = 250
"""Steps below which the default learning rate rises no more."""


@dataclass(frozen=True)
class TrainConfig:
    """How to train the autoencoders of a run; the same for all of its sites."""

    architecture: ArchitectureName = "topk"
    """Architecture of the autoencoders; identity takes the model's own coordinates."""
    features: FeatureCount = 1024
    """Features of each autoencoder."""
    k: FeatureCount = 32
    """Active features a token: exact for the TopK family, the mean that a sparsity penalty is steered to for others."""
    tokens: TokenCount = 2_000_000
    """Tokens to train on, special ones not counted; text shorter than that is read several times."""
    seed: Seed = 0
    """Seed of initial weights and of the order of activations."""
    batch_size: BatchSize | None = None
    """Tokens a step; by default as many as leave a thousand steps, between 512 and 4096."""
    learning_rate: LearningRate | None = None
    """Peak learning rate of Adam; by default 0.048 / sqrt(width), or 0.064 / sqrt(width) where a penalty makes features
    sparse, times sqrt(1000 / steps), which is at most 2."""
    warmup: Share = 0.05
    """Share of the steps over which learning rate and sparsity penalty rise linearly."""
    decay: Share | None = None
    """Share of the steps, at the end, over which the learning rate falls linearly to zero; 0.6 by default, or 0.3 where
    a penalty makes features sparse."""
    context_length: ContextLength | None = None
    """Longest context, in tokens, that the model reads text in; 128, or less if the model takes less, by default."""
    packed: bool = False
    """Pack documents end to end into full contexts instead of one context a document."""
    exclude_special: bool = True
    """Leave out activations at special tokens, such as BOS; --no-exclude-special keeps them."""
    buffer_tokens: TokenCount = 2**16
    """Activations shuffled together; fewer where all sites would need more than 2 GB."""
    centre: Literal["mean", "geometric_median", "zero"] = "mean"
    """Start of the decoder bias: mean or geometric_median of activations, or zero."""
    sparsity: Weight | None = None
    """Fixed weight of the sparsity penalty; by default it is steered so that k features are active (1 if l0_loss is
    target)."""
    bandwidth: LearningRate | None = None
    """Width of JumpReLU's straight-through kernel at inputs of unit mean squared norm; 0.8 / sqrt(width) by default."""
    l0_loss: Literal["steered", "target"] = "steered"
    """JumpReLU's penalty: steered, L0 with a weight that brings it to k, or target, (L0 / k - 1)^2 of each token."""
    p_end: Share = 0.2
    """Exponent at which p-annealing ends; a fixed weight of the penalty is rescaled as the exponent falls."""
    k_start: FeatureCount | None = None
    """Active features a token at the first step, falling linearly to k over the warm-up; k throughout by default."""
    revival: Literal["auto", "auxk", "resample", "none"] = "auto"
    """What brings dead features back: auxk, resample, none, or auto, the architecture's own choice."""
    aux_alpha: Weight = 1 / 32
    """Weight of the AuxK loss."""
    aux_k: FeatureCount | None = None
    """Dead features a token in the AuxK loss; an eighth of k, rounded up, by default."""
    dead_tokens: TokenCount | None = None
    """Silent tokens after which a feature counts as dead; a hundredth of `tokens`, at most ten million, by default."""
    autocast: bool = True
    """Run matrix products on CUDA in bfloat16; --no-autocast keeps the precision of the weights."""
    log_steps: Positive = 100
    """Steps between lines of the training log."""
    checkpoints: Repeats = 10
    """Checkpoints over the run; the last two are kept until it ends. 0 for none."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.k_start is not None and self.k_start < self.k:
            raise UserError(f"k-start is {self.k_start} and k is {self.k}: k falls to k, so it starts there or above")
        if self.architecture != "identity" and self.features < self.k:
            raise UserError(f"features is {self.features} and k is {self.k}: k is at most the number of features")

    @property
    def batch(self) -> int:
        """Tokens a step."""
        if self.batch_size is not None:
            return self.batch_size
        wanted = 2 ** int(math.log2(max(1, self.tokens / 1000)))
        return min(4096, max(512, wanted))

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return max(1, self.tokens // self.batch)

    @property
    def k_aux(self) -> int:
        """Dead features a token in the AuxK loss."""
        return self.aux_k or -(-self.k // 8)

    @property
    def dead_after(self) -> int:
        """Tokens without activity after which a feature counts as dead."""
        return self.dead_tokens or min(10_000_000, max(4096, self.tokens // 100))

    def learning_rate_at(self, step: int, width: int) -> float:
        """The learning rate of step 0, 1, ..., for a site of the given width."""
        from sae.architectures import architecture  # the options themselves are read without torch

        recipe = architecture(self.architecture)
        decay = recipe.decay if self.decay is None else self.decay
        usual = recipe.learning_rate / math.sqrt(width * max(self.steps, FEWEST_RATE_STEPS) / RATE_STEPS)
        peak = self.learning_rate or usual
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        fall = min(1.0, (self.steps - step) / max(1.0, decay * self.steps))
        return peak * rise * fall


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune autoencoders while they are spliced into the model.

    Defaults were chosen on the 16 sites of a small model (width 64, F = 512, k = 16), trained on 500k tokens and
    fine-tuned on 100k more, by the cross-entropy on held-out text with all sites spliced (trained: +1.15 nats) and by
    the sum of what each site costs alone (.76):

    - `reconstruction`: weights of .25, 1 and 4 give +.67, +.61 and +.60 for all, 1.05, .88 and .77 for the sites alone;
    - `learning_rate`: .04 / √width gives +.70, .02 / √width +.61, .008 / √width +.59, an eighth of what training uses;
    - all sites at every step: a random choice of sites gives +.71, and .76 for the sites alone, which the larger
      weight reaches as well.
    """

    loss: Literal["kl", "ce"] = "kl"
    """What spliced predictions are judged by: kl (divergence from the model's own) or ce (loss on the text)."""
    tokens: TokenCount = 400_000
    """Tokens to fine-tune on; text shorter than that is read several times."""
    reconstruction: Weight = 4.0
    """Weight of the reconstruction error at each site, relative to that of the predictions."""
    batch_size: Annotated[int, Range(2, 10**6)] | None = None
    """Tokens a step, padding counted; by default as many as leave 200 steps, between 512 and 4096."""
    learning_rate: LearningRate | None = None
    """Peak learning rate of Adam; 0.008 / sqrt(width) by default."""
    warmup: Share = 0.05
    """Share of the steps over which the learning rate rises; afterwards it falls linearly to zero."""
    context_length: ContextLength | None = None
    """Longest context, in tokens; 128, or less if the model takes less, by default."""
    packed: bool = False
    """Pack documents end to end into full contexts instead of one context a document."""
    exclude_special: bool = True
    """Special tokens, such as BOS, keep their activations; with --no-exclude-special they are reconstructed as well."""
    log_steps: Positive = 20
    """Steps between lines of the log."""
    checkpoints: Repeats = 5
    """Checkpoints over the run; the last two are kept until it ends. 0 for none."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def batch(self) -> int:
        """Tokens a step, padding counted."""
        if self.batch_size is not None:
            return self.batch_size
        return min(4096, max(512, 2 ** int(math.log2(max(1, self.tokens / 200)))))

    def learning_rate_at(self, done: float, width: int) -> float:
        """The learning rate when a share `done` of the tokens is read, for a site of the given width."""
        peak = self.learning_rate or 0.008 / math.sqrt(width)
        rise = min(1.0, done / self.warmup) if self.warmup else 1.0
        return peak * rise * max(0.0, 1 - max(0.0, done - self.warmup) / max(1e-9, 1 - self.warmup))


def with_contexts_of(cache: CachedActivations, config: TrainConfig) -> TrainConfig:
    """A training config with the contexts of a cache; `UserError` for one that asks for others."""
    usual = TrainConfig()
    for name in ("context_length", "packed", "exclude_special"):
        asked, has = getattr(config, name), getattr(cache.manifest, name)
        if asked not in (getattr(usual, name), has):
            raise UserError(f"the cache in {str(cache.folder)!r} was made with {name} {has}, not {asked}")
        config = replace(config, **{name: has})
    return config
