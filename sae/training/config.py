"""The options of training and of fine-tuning, with their defaults; they are read without torch.

None needs tuning at another size: `tests/benchmarks/README.md` says how they were chosen.
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


@dataclass(frozen=True)
class TrainConfig:
    """How to train the autoencoders of a run; the same for all of its sites."""

    architecture: ArchitectureName = "topk"
    """Architecture of the autoencoders; identity takes the model's own coordinates."""
    kind: Literal["sae", "transcoder"] = "sae"
    """Dictionaries of the MLPs: sae reads what the MLP adds to the residual stream, transcoder what it reads."""
    skip: bool = False
    """Transcoders have a skip connection as well, a linear map from what they read to what they write."""
    read: Literal["mlp_resid", "mlp_norm", "mlp_in"] = "mlp_in"
    """Place at which transcoders read: the residual stream before the MLP's norm (mlp_resid), normalised before its
    gain (mlp_norm), or after it (mlp_in)."""
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
    sparse, times sqrt(1000 / steps), which is at most 2; twice that for transcoders with exactly k features."""
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
    """Special tokens, such as BOS, are left out by default; --no-exclude-special keeps their activations."""
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
    """How dead features come back: auxk, resample, none, or auto, the architecture's default."""
    aux_alpha: Weight = 1 / 32
    """Weight of the AuxK loss."""
    aux_k: FeatureCount | None = None
    """Dead features a token in the AuxK loss; an eighth of k, rounded up, by default."""
    dead_tokens: TokenCount | None = None
    """Silent tokens after which a feature counts as dead; a hundredth of `tokens`, at most ten million, by default."""
    autocast: bool = True
    """On CUDA, matrix products run in bfloat16 by default; --no-autocast keeps the precision of the weights."""
    log_steps: Positive = 100
    """Steps between lines of the training log."""
    checkpoints: Repeats = 10
    """Checkpoints over the run; the last two stay until it ends. 0 for none."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.k_start is not None and self.k_start < self.k:
            raise UserError(f"k-start is {self.k_start} and k is {self.k}: k falls to k, so it starts there or above")
        if self.kind == "sae" and (self.skip or self.read != "mlp_in"):
            wrong = "skip is on" if self.skip else f"read is {self.read!r}"
            raise UserError(f"{wrong}, and kind is 'sae': give --kind transcoder, which alone reads another place")
        if self.kind == "transcoder" and self.architecture == "identity":
            raise UserError("architecture is 'identity' and kind 'transcoder': --saes mlp-neurons are these, untrained")
        if self.kind == "transcoder" and self.revival == "resample":
            raise UserError("revival is 'resample' and kind 'transcoder': errors are no directions to read; take auxk")
        if self.architecture != "identity" and self.features < self.k:
            raise UserError(f"features is {self.features} and k is {self.k}: k is at most the number of features")

    @property
    def batch(self) -> int:
        """Tokens a step."""
        return self.batch_size or _batch_for(self.tokens, steps=1000)

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


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune autoencoders while they are spliced into the model."""

    loss: Literal["kl", "ce"] = "kl"
    """Measure of spliced predictions: kl (divergence from the model's own) or ce (loss on the text)."""
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
    """Special tokens, such as BOS, keep their activations by default; --no-exclude-special reconstructs them too."""
    log_steps: Positive = 20
    """Steps between lines of the log."""
    checkpoints: Repeats = 5
    """Checkpoints over the run; the last two stay until it ends. 0 for none."""

    def __post_init__(self) -> None:
        check_options(self)

    @property
    def batch(self) -> int:
        """Tokens a step, padding counted."""
        return self.batch_size or _batch_for(self.tokens, steps=200)

    def learning_rate_at(self, share: float, width: int) -> float:
        """Give the learning rate when a share of the tokens has been read: a linear rise, then a linear fall to zero.

        Args:
            share: Share of the tokens, 0 to 1.
            width: Width of the site.

        Returns:
            The learning rate.
        """
        peak = self.learning_rate or 0.008 / math.sqrt(width)
        rise = min(1.0, share / self.warmup) if self.warmup else 1.0
        return peak * rise * max(0.0, 1 - max(0.0, share - self.warmup) / max(1e-9, 1 - self.warmup))


def _batch_for(tokens: int, *, steps: int) -> int:
    """The power of two between 512 and 4096 that leaves about so many steps."""
    return min(4096, max(512, 2 ** int(math.log2(max(1, tokens / steps)))))


def with_contexts_of(cache: CachedActivations, config: TrainConfig) -> TrainConfig:
    """A training config with the contexts of a cache; `UserError` for one that asks for others."""
    usual = TrainConfig()
    for name in ("context_length", "packed", "exclude_special"):
        asked, cached = getattr(config, name), getattr(cache.manifest, name)
        if asked not in (getattr(usual, name), cached):
            raise UserError(f"the cache in {str(cache.folder)!r} was made with {name} {cached}, not {asked}")
        config = replace(config, **{name: cached})
    return config
