"""How faithfulness is measured and how masks are learned: the options of both, which import no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from circuits.options import AblationOptions
from sae._options import BatchSize, DescentSteps, LearningRate, Positive, Repeats, Resamples, Seed, check_options
from sae.errors import UserError


@dataclass(frozen=True)
class FaithfulnessOptions(AblationOptions):
    """How faithfulness is measured."""

    random: Repeats = 3
    """Random circuits of each size to compare with."""
    seed: Seed = 0
    """Seed of the random circuits and of resampling."""
    batch_size: BatchSize = 64
    """Prompts that go through the model at once."""
    resamples: Resamples = 1000
    """Times the prompts, or their templates where they share them, are drawn anew for 95 % intervals (none for fewer
    than 5 of them); 0 leaves intervals out.
    """

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class MaskOptions(AblationOptions):
    """How a mask is learned; ablated nodes are the masked ones, and optimal constants are learned with the mask."""

    steps: DescentSteps = 150
    """Steps of gradient descent."""
    match: Literal["cases", "prompts"] = "cases"
    """What has to reach the whole model's metric: cases (means over prompts of one case) or prompts (every single one,
    which takes more nodes).
    """
    start: Literal["effects", "equal"] = "effects"
    """Where scores start: effects (the ranking of the given nodes) or equal."""
    smallest: Positive | None = None
    """Smallest number of nodes a prompt is given; a fiftieth of all by default."""
    largest: Positive | None = None
    """Largest number of nodes a prompt is given; a third of all by default."""
    batch_size: BatchSize = 64
    """Prompts that go through the model at once; what is learned does not depend on it."""
    learning_rate: LearningRate = 0.2
    """Learning rate of Adam, falling to a tenth over the steps."""
    temperature: LearningRate = 1.0
    """Width of the gate's gradient in units of the score, falling to a fiftieth over the steps."""
    seed: Seed = 0
    """Seed of prompts and budgets."""

    def __post_init__(self) -> None:
        check_options(self)
        if self.smallest is not None and self.largest is not None and self.largest < self.smallest:
            raise UserError(f"largest is {self.largest}: it must be at least smallest, {self.smallest}")
