"""What `sfc compare-methods` is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from circuits.attribution import METHODS
from circuits.attribution.integrated_gradients import RULES
from sae._options import Count, DescentSteps, Gibibytes, Range, Resamples, Seed, Steps, check_ranges, parse_sizes
from sae.errors import UserError, unknown

MASK = "mask"
RANKINGS = (*METHODS, MASK)
"""Whatever ranks nodes: the node methods, and learned masks."""


@dataclass(frozen=True)
class CompareOptions:
    """What is compared, and how circuits are scored."""

    methods: str = "ig,ig-adaptive,ig-inputs,attrib,relp,graddrop,mask,activation-difference,random"
    """Node methods, comma-separated; exact is one as well, and mask learns which nodes to keep."""
    neurons: str = "ig"
    """Methods that are also run on neurons; an empty text for none."""
    sizes: str = "10,20,50,100,200,500"
    """Circuit sizes of the table; the curve is measured in between and up to all nodes."""
    sample: Count = 1000
    """Features of each dictionary patched exactly, drawn at random from those that differ; 0 for no correlations."""
    rule: str = "midpoint"
    """Quadrature of ig and ig-inputs: midpoint, gauss-legendre or left-riemann (the paper's code)."""
    steps: Steps = 10
    """Quadrature nodes of ig and ig-inputs."""
    residual: Annotated[float, Range(0, 1, above=True)] = 0.003
    """Completeness error ig-adaptive goes down to, as a share of the total effect."""
    mask_start: str = "ig"
    """Method whose ranking learned masks start from; its time is counted with theirs."""
    mask_steps: DescentSteps = 150
    """Steps of gradient descent of learned masks."""
    metric: str = "logit_difference"
    """What is explained: any metric of `sfc discover`."""
    sites: str = "all"
    """Sites of the circuits, such as all, resid or resid,mlp_3; each needs an autoencoder."""
    start_site: str | None = None
    """First site that is ablated; everything before is given for free. All sites by default."""
    ablation: str = "mean"
    """What ablated nodes become: mean, optimal, counterfactual, resample, zero or mean-pooled."""
    errors: str = "nodes"
    """Errors of the autoencoders: nodes (ranked among the features), keep (all left in) or ablate (all ablated)."""
    seed: Seed = 0
    """Seed of the sample and of random circuits."""
    resamples: Resamples = 1000
    """Times the held-out prompts are drawn anew for 95 % intervals of CPR and CMD; 0 leaves them out."""
    memory: Gibibytes = 2.0
    """Budget in GiB for what the model keeps during a forward and backward pass; prompts are batched to it."""

    def __post_init__(self) -> None:
        for method in [*split(self.methods), *split(self.neurons)]:
            if method not in RANKINGS:
                raise unknown("method", method, RANKINGS)
        if self.mask_start not in METHODS:
            raise unknown("mask start", self.mask_start, METHODS)
        if not split(self.methods) and not split(self.neurons):
            raise UserError(f"methods is empty: give some of {', '.join(RANKINGS)}")
        if self.rule not in RULES:
            raise unknown("rule", self.rule, RULES)
        check_ranges(self)
        self.circuit_sizes  # noqa: B018

    @property
    def circuit_sizes(self) -> list[int]:
        """Sizes of the table."""
        return sorted(set(parse_sizes(self.sizes)))


def split(text: str) -> list[str]:
    """Comma-separated words, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
