"""From per-example effects to the nodes of a circuit.

Legend: B examples, S positions, F features; feature F is the error node, F + 1 that of a skip connection.

1. Aggregate: `sum` adds an example's positions up and averages over examples, one number a (site, feature);
   `position` averages over equally long prompts, one number a (site, position, feature) (Marks et al. 2024, section
   3.2); `spans` adds up the tokens of each named span and averages over examples, one number a (site, span, feature).
2. Rank all nodes of all sites, errors included, by |effect|, and keep those above a threshold or the n strongest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from circuits._tensors import NOT_SAVED
from circuits.attribution.effects import ENTRIES, SiteEffects
from circuits.options import Aggregation
from circuits.prompts.dataset import PromptSet
from sae.errors import UserError
from sae.model.sites import Site

COLUMNS = ("feature", "position", "effect")
"""The columns of `SiteNodes`."""


@dataclass(frozen=True)
class SiteNodes:
    """Nodes of one site with their aggregated effects, strongest first."""

    n_features: int = field(metadata=NOT_SAVED)
    """F; `feature == F` is the error node, F + 1 what a skip connection writes."""
    feature: Tensor
    """[n] int64."""
    position: Tensor
    """[n] int64 token position, or number of the span; -1 where positions are summed."""
    effect: Tensor
    """[n] float32."""
    spans: tuple[str, ...] = field(default=(), metadata=NOT_SAVED)
    """Names of the spans that `position` numbers; empty where it is a token position or summed."""

    def __len__(self) -> int:
        return len(self.feature)

    def __getitem__(self, index: Tensor | slice) -> SiteNodes:
        return SiteNodes(self.n_features, self.feature[index], self.position[index], self.effect[index], self.spans)

    @property
    def is_error(self) -> Tensor:
        """[n] bool."""
        return self.feature == self.n_features

    @property
    def is_skip(self) -> Tensor:
        """[n] bool: what a transcoder's skip connection writes."""
        return self.feature > self.n_features

    @property
    def is_feature(self) -> Tensor:
        """[n] bool: neither of these."""
        return self.feature < self.n_features

    def ids(self, site: Site) -> list[str]:
        """Node names: `resid_3/120`, `resid_3/error`, `mlp_3/skip`, with a position `resid_3/120@5` or a span
        `resid_3/120@verb`.
        """
        names, others = [], {self.n_features: "error", self.n_features + 1: "skip"}
        for feature, position in zip(self.feature.tolist(), self.position.tolist(), strict=True):
            name = f"{site.name}/{others.get(feature, feature)}"
            where = self.spans[position] if self.spans and position >= 0 else position
            names.append(name if position < 0 else f"{name}@{where}")
        return names

    @property
    def summed(self) -> bool:
        """Whether every node is at all positions."""
        return bool((self.position < 0).all())

    def where(self, prompts: PromptSet) -> Tensor:
        """[B or 1, S, n] bool: the tokens at which each node is."""
        position = self.position.to(prompts.clean.input_ids.device)
        if self.summed:
            return (position < 0).expand(1, prompts.clean.n_positions, -1)
        return (position < 0) | (self.token_positions(prompts)[..., None] == position)

    def token_positions(self, prompts: PromptSet) -> Tensor:
        """[B or 1, S] int64: where each token is among the positions, or spans, that nodes live at; -1 at padding.

        Raises UserError unless prompts are equally long, or have no other spans than the nodes'.
        """
        if self.spans:
            return prompts.positions(self.spans)
        if int(prompts.clean.lengths.min()) != prompts.clean.n_positions:
            raise UserError("a circuit by position needs prompts of the length it was found on")
        return prompts.positions()[:1]


Nodes = dict[Site, SiteNodes]


def effects_of(effects: SiteEffects, nodes: SiteNodes | None) -> SiteEffects:
    """The effects of some nodes of a site alone; none of a site that has none of them."""
    feature, position = effects.feature.long(), effects.position.long()
    if nodes is None:
        inside = torch.zeros_like(feature, dtype=torch.bool)
    elif nodes.summed:
        inside = torch.isin(feature, nodes.feature)
    else:
        width = effects.n_features + 2
        inside = torch.isin(position * width + feature, nodes.position * width + nodes.feature)
    columns = (getattr(effects, name)[inside] for name in ENTRIES)
    return SiteEffects(effects.n_features, *columns)


def joined(first: SiteNodes, second: SiteNodes) -> SiteNodes:
    """The nodes of a site in the first, then those in the second."""
    columns: dict[str, Any] = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in COLUMNS}
    return replace(first, spans=first.spans or second.spans, **columns)


def positions_by(aggregation: Aggregation, prompts: PromptSet) -> Tensor | None:
    """[B, S] int64: tokens of a prompt with equal number are one node of a feature; None where all of them are."""
    if aggregation == "sum":
        return None
    return prompts.positions(prompts.spans if aggregation == "spans" else ())


def aggregate_site(
    effects: SiteEffects, *, n_examples: int, n_positions: int, aggregation: Aggregation, spans: Sequence[str] = ()
) -> SiteNodes:
    """All nodes of a site whose aggregated effect is not zero, strongest first; `spans`: names, for aggregation spans,
    where `effects.position` is the number of the span.
    """
    if aggregation == "sum":
        feature, effect = effects.by_feature(n_examples)
        feature, effect = feature[effect != 0], effect[effect != 0]
        position = torch.full_like(feature, -1)
    else:
        table = effects.by_position(n_examples, len(spans) if aggregation == "spans" else n_positions)
        is_there = table.values() != 0
        (position, feature), effect = table.indices()[:, is_there], table.values()[is_there]
    order = effect.abs().argsort(descending=True, stable=True)
    names = tuple(spans) if aggregation == "spans" else ()
    return SiteNodes(effects.n_features, feature[order], position[order], effect[order], names)


def aggregate(
    effects: Mapping[Site, SiteEffects],
    *,
    n_examples: int,
    n_positions: int,
    aggregation: Aggregation = "sum",
    spans: Sequence[str] = (),
) -> Nodes:
    """`aggregate_site` for every site."""
    return {
        site: aggregate_site(
            of_site, n_examples=n_examples, n_positions=n_positions, aggregation=aggregation, spans=spans
        )
        for site, of_site in effects.items()
    }


def select_nodes(nodes: Mapping[Site, SiteNodes], *, top: int | None = None, threshold: float | None = None) -> Nodes:
    """The `top` strongest nodes over all sites, or those with |effect| > `threshold`; both given: both must hold."""
    magnitudes = torch.cat([site_nodes.effect.abs() for site_nodes in nodes.values()])
    bound = -1.0 if threshold is None else threshold
    keep = magnitudes > bound
    if top is not None and top < len(magnitudes):
        strongest = magnitudes.argsort(descending=True, stable=True)[:top]
        keep &= torch.zeros_like(keep).index_fill_(0, strongest, True)
    return masked_nodes(nodes, keep)


def masked_nodes(nodes: Mapping[Site, SiteNodes], keep: Tensor) -> Nodes:
    """The nodes at which `keep` [n] is true, counted over all sites in their order."""
    masks = keep.split([len(site_nodes) for site_nodes in nodes.values()])
    return {site: site_nodes[mask] for (site, site_nodes), mask in zip(nodes.items(), masks, strict=True)}


def ranked(nodes: Mapping[Site, SiteNodes]) -> list[tuple[str, float]]:
    """Name and effect of every node, the strongest first."""
    rows = [
        row
        for site, site_nodes in nodes.items()
        for row in zip(site_nodes.ids(site), site_nodes.effect.tolist(), strict=True)
    ]
    return sorted(rows, key=lambda row: -abs(row[1]))


def distinguishable(nodes: Nodes, intervals: Mapping[Site, Tensor]) -> Nodes:
    """The nodes whose interval ([n, 2] per site, in their order) leaves out zero."""
    return {site: site_nodes[intervals[site].prod(-1) > 0] for site, site_nodes in nodes.items()}


def count(nodes: Mapping[Site, SiteNodes]) -> int:
    """Number of nodes over all sites."""
    return sum(len(site_nodes) for site_nodes in nodes.values())
