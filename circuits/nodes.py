"""From per-example effects to the nodes of a circuit.

Legend: B examples, S positions, F features; feature F is the error node.

1. Aggregate: `sum` adds an example's positions up and averages over examples, one number a (site, feature);
   `position` averages over equally long prompts, one number a (site, position, feature) (Marks et al. 2024, section
   3.2).
2. Rank all nodes of all sites, errors included, by |effect|, and keep those above a threshold or the n strongest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from circuits.attribution.effects import SiteEffects
from sae.errors import unknown
from sae.sites import Site

AGGREGATIONS = ("sum", "position")


@dataclass(frozen=True)
class SiteNodes:
    """Nodes of one site with their aggregated effects, strongest first."""

    n_features: int
    """F; `feature == F` is the error node."""
    feature: torch.Tensor
    """[n] int64."""
    position: torch.Tensor
    """[n] int64; -1 where positions are summed."""
    effect: torch.Tensor
    """[n] float32."""

    def __len__(self) -> int:
        return len(self.feature)

    def __getitem__(self, index: torch.Tensor | slice) -> SiteNodes:
        return SiteNodes(self.n_features, self.feature[index], self.position[index], self.effect[index])

    @property
    def is_error(self) -> torch.Tensor:
        """[n] bool."""
        return self.feature == self.n_features

    def ids(self, site: Site) -> list[str]:
        """Node names: `resid_3/120`, `resid_3/error`, with a position `resid_3/120@5`."""
        names = []
        for feature, position in zip(self.feature.tolist(), self.position.tolist(), strict=True):
            name = f"{site.name}/{'error' if feature == self.n_features else feature}"
            names.append(name if position < 0 else f"{name}@{position}")
        return names


Nodes = dict[Site, SiteNodes]


def aggregate_site(effects: SiteEffects, *, n_examples: int, n_positions: int, aggregation: str) -> SiteNodes:
    """All nodes of a site whose aggregated effect is not zero, strongest first."""
    if aggregation not in AGGREGATIONS:
        raise unknown("aggregation", aggregation, AGGREGATIONS)
    if aggregation == "sum":
        total = effects.summed(n_examples)
        feature = total.nonzero()[:, 0]
        position, effect = torch.full_like(feature, -1), total[feature]
    else:
        table = effects.by_position(n_examples, n_positions)
        (position, feature), effect = table.indices(), table.values()
    order = effect.abs().argsort(descending=True, stable=True)
    return SiteNodes(effects.n_features, feature[order], position[order], effect[order])


def select_nodes(nodes: Mapping[Site, SiteNodes], *, top: int | None = None, threshold: float | None = None) -> Nodes:
    """The `top` strongest nodes over all sites, or those with |effect| > `threshold`; both given: both must hold."""
    magnitudes = torch.cat([site_nodes.effect.abs() for site_nodes in nodes.values()])
    bound = -1.0 if threshold is None else threshold
    keep = magnitudes > bound
    if top is not None and top < len(magnitudes):
        strongest = magnitudes.argsort(descending=True, stable=True)[:top]
        keep &= torch.zeros_like(keep).index_fill_(0, strongest, True)
    parts = keep.split([len(site_nodes) for site_nodes in nodes.values()])
    return {site: site_nodes[part] for (site, site_nodes), part in zip(nodes.items(), parts, strict=True)}


def distinguishable(nodes: Nodes, intervals: Mapping[Site, torch.Tensor]) -> Nodes:
    """The nodes whose interval ([n, 2] per site, in their order) leaves out zero."""
    return {site: site_nodes[intervals[site].prod(-1) > 0] for site, site_nodes in nodes.items()}


def count(nodes: Mapping[Site, SiteNodes]) -> int:
    """Number of nodes over all sites."""
    return sum(len(site_nodes) for site_nodes in nodes.values())
