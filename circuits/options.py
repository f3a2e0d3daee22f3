"""Options of circuit analyses, each with its one sentence, which is `--help` and documentation; no torch is imported.

`DiscoverOptions`, `FaithfulnessOptions`, `MaskOptions` and `CompareOptions` are made of classes that they share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from sae._options import (
    BatchSize,
    Count,
    DescentSteps,
    Gibibytes,
    LearningRate,
    Positive,
    Range,
    Repeats,
    Resamples,
    Seed,
    Steps,
    check_options,
)  # fmt: skip
from sae.errors import UserError, unknown

Method = Literal[
    "ig", "ig-adaptive", "ig-inputs", "attrib", "relp", "gim", "graddrop", "exact", "activation-difference", "random"
]
METHODS: tuple[str, ...] = get_args(Method)
"""Node methods: integrated gradients (ig, ig-adaptive, ig-inputs), attribution patching (attrib), relevance patching
(relp), gradient interaction modifications (gim), gradient drop (graddrop), exact patching, and baselines that never
look at the metric.
"""
ENSEMBLE = "ensemble:"
"""How the name of an ensemble begins: `ensemble:attrib,relp,gim`, or with + for the commas."""


def members(method: str) -> tuple[str, ...]:
    """The methods of an ensemble; of any other method itself."""
    if not method.startswith(ENSEMBLE):
        return (method,)
    return tuple(name.strip() for name in method.removeprefix(ENSEMBLE).replace("+", ",").split(","))


def check_method(method: str, *others: str) -> None:
    """Raise UserError for a name that is none of the methods, an ensemble of some, or one of the others."""
    names = members(method)
    for name in names:
        if name not in (*METHODS, *others):
            raise unknown("method", name, [*METHODS, *others])
    if method.startswith(ENSEMBLE) and (len({*names}) < 2 or len({*names}) < len(names) or {*names} & {*others}):
        raise UserError(f"method is {method!r}: an ensemble is of two or more methods, such as ensemble:ig-inputs,gim")


Rule = Literal["midpoint", "gauss-legendre", "left-riemann"]
Aggregation = Literal["sum", "position", "spans"]
EdgeActive = Literal["either", "clean"]
Ablation = Literal["mean", "optimal", "counterfactual", "resample", "zero", "mean-pooled"]
ABLATIONS: tuple[str, ...] = get_args(Ablation)
Operation = Literal["zero", "mean", "resample", "set", "clamp", "scale", "steer"]
EditedTokens = Literal["all", "active", "prompt", "generated"]
Freeze = Literal["attention"]
Errors = Literal["nodes", "keep", "ablate"]


@dataclass(frozen=True)
class QuadratureOptions:
    """How the gradient is averaged along a path."""

    rule: Rule = "midpoint"
    """Quadrature of ig and ig-inputs: midpoint, gauss-legendre or left-riemann (the paper's code)."""
    steps: Steps = 10
    """Quadrature nodes of ig and ig-inputs."""
    residual: Annotated[float, Range(0, 1, above=True)] = 0.003
    """Error of the sum check that ig-adaptive goes down to, as a share of the total effect."""


@dataclass(frozen=True)
class MethodOptions(QuadratureOptions):
    """How node effects are estimated."""

    method: str = "ig"
    """Node method: ig (integrated gradients), ig-adaptive, ig-inputs, attrib (attribution patching), relp, gim,
    graddrop, exact (patch every node), the baselines activation-difference and random, or the mean of several, each
    normalised, such as ensemble:ig-inputs,gim.
    """
    aggregation: Aggregation = "sum"
    """sum over positions; position for prompts of equal length; spans for prompts with named token spans."""

    def __post_init__(self) -> None:
        check_options(self)
        check_method(self.method)


@dataclass(frozen=True)
class BehaviourOptions:
    """Options of what is explained: the metric, the sites, and the memory allowed."""

    metric: str = "logit_difference"
    """What is explained: logit_difference, log_probability, kl, probe:FILE.safetensors (a linear probe's logit; sites
    after it are left out), probe-margin:FILE.safetensors (the same, turned so that prompts of opposite classes do not
    cancel), package.module:function or file.py:function.
    """
    sites: str = "all"
    """Sites of the circuit, such as all, resid or resid,mlp_3; each needs an autoencoder."""
    memory: Gibibytes = 2.0
    """Budget in GiB for what the model keeps during a forward and backward pass; prompts are batched to it."""


@dataclass(frozen=True)
class AblationOptions:
    """Options of an ablation: the values that nodes outside a circuit take."""

    ablation: Ablation = "mean"
    """What ablated nodes become: mean (per template and position), optimal (fitted from there so that the model does
    best with the circuits kept), counterfactual, resample, zero, or mean-pooled (over all templates and positions; it
    destroys what all prompts share, so that faithfulness says little).
    """
    start_site: str | None = None
    """First site that is ablated; everything before is given for free. All sites by default."""
    errors: Errors = "nodes"
    """Errors of the autoencoders: nodes (ranked among the features), keep (all left in) or ablate (all ablated)."""


# ------------------------------------------------------------------------------------------ of whole analyses


@dataclass(frozen=True)
class DiscoverOptions(BehaviourOptions, MethodOptions):
    """How a circuit is computed."""

    edge_nodes: Count = 300
    """Edges are computed among this many strongest nodes; 0 leaves edges out."""
    edge_active: EdgeActive = "either"
    """Where a downstream feature passes edges on: where it is active on the clean or the patch prompt (either), or on
    the clean prompt alone (clean, as in the paper's code).
    """


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
class ValidityOptions(AblationOptions):
    """How a circuit is put to the test."""

    nodes: Positive = 100
    """Nodes of the circuit that is tested: the strongest."""
    removed: Positive = 20
    """Strongest nodes that are ablated to see what takes over."""
    families: Annotated[int, Range(1, 50)] = 4
    """Most families of prompts that are looked for; 1 looks for none."""
    verify: Count = 20
    """Strongest nodes that are patched exactly, unless discovery did so; 0 leaves it out."""
    resamples: Annotated[int, Range(2, 10**6)] = 1000
    """Times the prompts, or their templates where they share them, are drawn anew (not for fewer than 5 of them)."""
    seed: Seed = 0
    """Seed of resampling."""
    batch_size: BatchSize = 64
    """Prompts that go through the model at once."""

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


@dataclass(frozen=True)
class AttentionOptions:
    """Which attention is explained; the heads that carry the circuit's strongest edges by default."""

    query: str | None = None
    """Token that looks: the name of a span, an index such as -1, last, or a word; the circuit's edges say by default.
    """
    key: str | None = None
    """Token that is looked at."""
    than: str | None = None
    """Another token: explain why the query looks at the key rather than at this one."""
    layer: Count | None = None
    """Layer of the head, from 0; by default the head is taken that looks most from query to key."""
    head: Count | None = None
    """Number of the head, from 0."""
    edges: Positive = 10
    """Edges into attention sites that are split over heads where no query is given, and as many out of them."""
    scores: Positive = 3
    """Heads, with a query and a key, whose scores are explained then."""

    def __post_init__(self) -> None:
        check_options(self)
        if (self.query is None) != (self.key is None):
            raise UserError(f"query is {self.query!r}, key {self.key!r}: give both, or neither")
        if self.query is None and not (self.than is self.layer is self.head is None):
            raise UserError("than, layer and head are of one query and key: give these too")
        if self.head is not None and self.layer is None:
            raise UserError(f"head is {self.head}: give its layer too")
