"""Options of SHIFT and of the test of targeted probes; no torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from sae._options import (
    MANY,
    Gibibytes,
    LearningRate,
    Positive,
    Range,
    Repeats,
    Seed,
    Share,
    Steps,
    check_options,
)  # fmt: skip
from sae.errors import UserError

LAST, MEAN = "last", "mean"
REST = "rest"
"""Word for the texts of the data whose label is neither of the two classes."""


@dataclass(frozen=True)
class ReadOptions:
    """Which texts are read, and where the probe reads the model."""

    intended: str = "intended"
    """Key of the label that the probe is to learn."""
    classes: str | None = None
    """Values of this label that are told apart, such as nurse,professor; all that occur by default."""
    examples: Annotated[int, Range(4, MANY)] | None = None
    """At most this many texts of each group (intended and spurious label), the first; all by default."""
    test_share: Annotated[float, Range(0.05, 0.95)] = 0.25
    """Share of each group that is kept for testing, where no texts to test on are given."""
    site: str | None = None
    """Where the probe reads, such as resid_2; the residual stream two thirds up by default."""
    position: str = MEAN
    """Token that the probe reads: mean (of all tokens), last, or the name of a span."""
    penalty: LearningRate = 1.0
    """Inverse strength of the probe's L2 penalty."""
    seed: Seed = 0
    """Seed of the divisions and of random features."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class ShiftOptions(ReadOptions):
    """How the probe's circuit is found, who judges its features, and what becomes of those that are not kept."""

    spurious: str = "spurious"
    """Key of the label that it is not to use."""
    pairs: str | None = None
    """Which labels go together in the ambiguous texts, such as nurse=female,professor=male; as in most texts by
    default.
    """
    sites: str = "all"
    """Sites of the circuit, such as all, resid or resid,mlp_3; those after the probe's are left out."""
    method: Literal["ig", "attrib"] = "ig"
    """Node method: ig (integrated gradients) or attrib (attribution patching); nodes go to zero, as in the paper."""
    steps: Steps = 10
    """Quadrature nodes of ig."""
    memory: Gibibytes = 2.0
    """Budget in GiB for what the model keeps during a forward and backward pass."""
    circuit_texts: Positive = 100
    """Texts that the circuit, and those of the skylines, are found on, as many of each group."""
    features: Positive = 100
    """Strongest features of the circuit that are judged."""
    tokens: Literal["all", "read"] = "all"
    """Features at which tokens are judged: all, or those that the probe reads alone."""
    drop: Path | None = None
    """Judge: a person. File with the features to ablate, one a line (resid_3/120, or with a span resid_3/120@subject;
    what follows # is a note).
    """
    keywords: str | None = None
    """Judge: a regular expression; ablated are features in whose label, or else top tokens, it is found."""
    concept_data: str | None = None
    """Judge: correlation. Texts with the spurious label, of which no other label is read; ablated are features whose
    activation there correlates with it. rest: those of --data whose intended label is neither of the classes.
    """
    threshold: Share = 0.3
    """Correlation from which a feature is ablated."""
    program: str | None = None
    """Judge: a program, which reads a JSON line for each feature and answers keep or drop, one a line."""
    timeout: Annotated[float, Range(0, 10**6, above=True)] = 600.0
    """Seconds that it may take."""
    operation: Literal["mean", "zero"] = "mean"
    """What features become: their mean over the ambiguous texts (at their span), or zero."""
    random: Repeats = 5
    """Draws of equally many random active features to compare with; 0 leaves them out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [name for name in ("drop", "keywords", "concept_data", "program") if getattr(self, name) is not None]
        if len(given) > 1:
            names = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            raise UserError(f"{names} are two judges: give one")


@dataclass(frozen=True)
class PerturbationOptions(ReadOptions):
    """How probes of several classes are perturbed."""

    intended: str = "label"
    """Key of the label."""
    sizes: str = "2,5,10,20,50"
    """Numbers of features that are ablated, comma-separated."""
    operation: Literal["zero", "mean"] = "zero"
    """What they become: zero, as in SAEBench, or their mean over the training texts, which leaves thresholds where they
    are.
    """
    rank: Literal["absolute", "positive"] = "absolute"
    """Features of a class: absolute, by |difference of activation x output of the probe|; positive, those that are more
    active on the class and push its probe up, as in SAEBench.
    """
