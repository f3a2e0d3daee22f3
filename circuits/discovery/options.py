"""How a circuit is computed: the options of `discover`, which import no torch."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.options import Aggregation, BehaviourOptions, EdgeActive, Method, QuadratureOptions
from sae._options import Count, check_options


@dataclass(frozen=True)
class DiscoverOptions(BehaviourOptions, QuadratureOptions):
    """How a circuit is computed."""

    method: Method = "ig"
    """Node method: ig (integrated gradients), ig-adaptive, ig-inputs, attrib (attribution patching), relp, graddrop,
    exact (patch every node), or the baselines activation-difference and random.
    """
    aggregation: Aggregation = "sum"
    """sum over positions; position for prompts of equal length; spans for prompts with named token spans."""
    edge_nodes: Count = 300
    """Edges are computed among this many strongest nodes; 0 leaves edges out."""
    edge_active: EdgeActive = "either"
    """Where a downstream feature passes edges on: where it is active on the clean or the patch prompt (either), or on
    the clean prompt alone (clean, as in the paper's code).
    """

    def __post_init__(self) -> None:
        check_options(self)
