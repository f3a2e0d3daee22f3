"""Options of `sfc compare-methods`; no torch is imported here."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.options import (
    METHODS,
    AblationOptions,
    BehaviourOptions,
    Method,
    QuadratureOptions,
    check_method,
)  # fmt: skip
from sae._options import BatchSize, Count, DescentSteps, Positive, Resamples, Seed, check_options, parse_sizes
from sae.errors import UserError

MASK, MASK_EQUAL, EDGE_MASK = MASKS = ("mask", "mask-equal", "edge-mask")
"""Learned masks: of nodes, from a ranking or from scores that are alike, and of edges jointly with the nodes."""
SIGNS = "signs:"
"""How the name of sign-consistent selection by a method's effects begins."""
RANKINGS = (*METHODS, *MASKS)
"""Whatever ranks nodes: the node methods, and learned masks."""


@dataclass(frozen=True)
class CompareOptions(AblationOptions, BehaviourOptions, QuadratureOptions):
    """Options of a comparison: methods, dictionaries, and how circuits are scored."""

    methods: str = "ig,ig-adaptive,ig-inputs,attrib,relp,gim,graddrop,mask,activation-difference,random"
    """What ranks nodes, comma-separated: a node method (those of the default, exact); ensemble:ig-inputs+gim, the mean
    of several, each normalised; signs:gim, nodes first that keep their sign on every draw of prompts; mask, which nodes
    to keep, learned from the ranking of --mask-start; mask-equal, the same from nothing; edge-mask, which edges to
    keep, nodes by when these join them to the metric.
    """
    neurons: str = "ig"
    """Methods that are also run on neurons; an empty text for none."""
    mlp_neurons: str = ""
    """Methods that are also run on the hidden neurons of the MLPs; none by default."""
    sizes: str = "10,20,50,100,200,500"
    """Circuit sizes of the table; the curve is measured in between and up to all nodes."""
    sample: Count = 1000
    """Features of each dictionary patched exactly, drawn at random from those that differ; 0 for no correlations."""
    mask_start: Method = "ig"
    """Method whose ranking learned masks start from; its time is counted with theirs."""
    mask_steps: DescentSteps = 150
    """Steps of gradient descent of learned masks."""
    mask_edge_nodes: Positive = 100
    """Nodes between which edge-mask learns edges, the first by --mask-start; all others rank behind them."""
    seed: Seed = 0
    """Seed of the sample and of random circuits."""
    resamples: Resamples = 1000
    """Times the held-out prompts are drawn anew for 95 % intervals of CPR and CMD; 0 leaves them out."""

    def __post_init__(self) -> None:
        for method in [*split(self.methods), *split(self.neurons), *split(self.mlp_neurons)]:
            check_method(method.removeprefix(SIGNS), *MASKS)
            if method.startswith(SIGNS) and method.removeprefix(SIGNS) in MASKS:
                raise UserError(f"method is {method!r}: a mask has no effects whose signs could differ")
            if method == EDGE_MASK and self.errors != "nodes":
                raise UserError(f"errors is {self.errors!r}: edge-mask takes errors as nodes")
        if not (split(self.methods) or split(self.neurons) or split(self.mlp_neurons)):
            raise UserError(f"methods is empty: give some of {', '.join(RANKINGS)}")
        check_options(self)
        self.circuit_sizes  # noqa: B018

    @property
    def circuit_sizes(self) -> list[int]:
        """Sizes of the table."""
        return sorted(set(parse_sizes(self.sizes)))


def split(text: str) -> list[str]:
    """Comma-separated words, each once."""
    return list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@dataclass(frozen=True)
class CompareCircuitsOptions(AblationOptions):
    """How circuits are compared with one another."""

    nodes: Positive = 100
    """Nodes of each circuit that are compared, the strongest."""
    edges: Positive = 1000
    """Edges of each circuit that are compared, the strongest."""
    shuffles: Resamples = 1000
    """Times the features of each site change names at random, to tell overlap from chance; 0 leaves that out."""
    examples: Positive = 100
    """Prompts of each circuit on which features are matched and circuits tested, at most."""
    transfer: bool = True
    """Whether each circuit's nodes are tested on the other's prompts."""
    batch_size: BatchSize = 64
    """Prompts that go through the model at once."""
    seed: Seed = 0
    """Seed of the shuffles and of random circuits."""

    def __post_init__(self) -> None:
        check_options(self)
