"""Options that several parts of a circuit analysis share, each with its one sentence; no torch is imported here.

`DiscoverOptions`, `FaithfulnessOptions`, `MaskOptions` and `CompareOptions` are made of these classes. The same
sentences are `--help` and documentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from sae._options import Gibibytes, Range, Steps, check_options

Method = Literal[
    "ig", "ig-adaptive", "ig-inputs", "attrib", "relp", "graddrop", "exact", "activation-difference", "random"
]
METHODS: tuple[str, ...] = get_args(Method)
"""Node methods: integrated gradients (ig, ig-adaptive, ig-inputs), attribution patching (attrib), relevance patching
(relp), gradient drop (graddrop), exact patching, and baselines that never look at the metric.
"""
Rule = Literal["midpoint", "gauss-legendre", "left-riemann"]
RULES: tuple[str, ...] = get_args(Rule)
Aggregation = Literal["sum", "position", "spans"]
AGGREGATIONS: tuple[str, ...] = get_args(Aggregation)
EdgeActive = Literal["either", "clean"]
ACTIVE: tuple[str, ...] = get_args(EdgeActive)
Ablation = Literal["mean", "optimal", "counterfactual", "resample", "zero", "mean-pooled"]
ABLATIONS: tuple[str, ...] = get_args(Ablation)
Operation = Literal["zero", "mean", "set", "scale", "steer"]
Errors = Literal["nodes", "keep", "ablate"]
ERRORS: tuple[str, ...] = get_args(Errors)


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

    method: Method = "ig"
    """Node method: ig (integrated gradients), ig-adaptive, ig-inputs, attrib (attribution patching), relp, graddrop,
    exact (patch every node), or the baselines activation-difference and random.
    """
    aggregation: Aggregation = "sum"
    """sum over positions; position for prompts of equal length; spans for prompts with named token spans."""

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class BehaviourOptions:
    """What is explained, through which sites, within how much memory."""

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
    """What becomes of the nodes that are not in a circuit."""

    ablation: Ablation = "mean"
    """What ablated nodes become: mean (per template and position), optimal (fitted from there so that the model does
    best with the circuits kept), counterfactual, resample, zero, or mean-pooled (over all templates and positions; it
    destroys what all prompts share, so that faithfulness says little).
    """
    start_site: str | None = None
    """First site that is ablated; everything before is given for free. All sites by default."""
    errors: Errors = "nodes"
    """Errors of the autoencoders: nodes (ranked among the features), keep (all left in) or ablate (all ablated)."""
