"""Options of the suite of tasks; no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from circuits.debiasing.options import MEAN
from sae._options import MANY, LearningRate, Positive, Range, Seed, check_options


@dataclass(frozen=True)
class SuiteOptions:
    """Which texts are read, where, and how many features a task may use."""

    suite_sites: str = "all"
    """Sites whose autoencoders are tried on the tasks, such as resid or resid_3,mlp_2."""
    label: str | None = None
    """Key of the texts' label; by default label, target or intended, whichever is there."""
    spurious: str = "spurious"
    """Key of a second label, with which spurious correlation removal (SCR) is measured where texts have it."""
    position: str = MEAN
    """Token that probes read: mean (of all tokens), as in SAEBench; last, as in sae-probes; or the name of a span."""
    examples: Annotated[int, Range(20, MANY)] = 5000
    """At most this many texts of a data set, of each class by its share."""
    test_share: Annotated[float, Range(0.05, 0.95)] = 0.2
    """Share of them that is kept for testing, where a data set has no texts for that."""
    probe_sizes: str = "1,2,5"
    """Numbers of features that sparse probes read."""
    ablation_sizes: str = "2,5,10,20,50,100,500"
    """Numbers of features that are ablated for SCR and TPP."""
    operation: Literal["zero", "mean"] = "zero"
    """What ablated features become: zero, as in SAEBench, or their mean over the texts learned from, which leaves the
    thresholds of probes where they are.
    """
    penalty: LearningRate = 1.0
    """Inverse strength of the probes' L2 penalty."""
    seed: Seed = 0
    """Seed of divisions, draws and resamples."""
    words: Positive = 10_000
    """Words of the vocabulary whose first letter is probed, for absorption; the first ones."""
    letters: Annotated[int, Range(1, 26)] = 20
    """Letters whose probe must work (F1 above .6) for absorption to be measured."""

    def __post_init__(self) -> None:
        check_options(self)
