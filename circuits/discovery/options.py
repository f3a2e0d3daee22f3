"""How a circuit is computed: the options of `discover`, which import no torch."""

from __future__ import annotations

from dataclasses import dataclass

from circuits.options import BehaviourOptions, EdgeActive, MethodOptions
from sae._options import Count


@dataclass(frozen=True)
class DiscoverOptions(BehaviourOptions, MethodOptions):
    """How a circuit is computed."""

    edge_nodes: Count = 300
    """Edges are computed among this many strongest nodes; 0 leaves edges out."""
    edge_active: EdgeActive = "either"
    """Where a downstream feature passes edges on: where it is active on the clean or the patch prompt (either), or on
    the clean prompt alone (clean, as in the paper's code).
    """
