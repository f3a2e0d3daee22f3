"""Sign-consistent selection: nodes whose mean effect has the same sign whichever prompts are drawn.

Legend: R resamples, G groups of prompts, n nodes.

1. Prompts are drawn anew R times, by template where they share templates (`circuits.uncertainty.bootstrap`).
2. A node is consistent if its mean effect has the sign it has on all prompts in a share `level` of the resamples (as in
   the Technion's entry to MIB, Mueller et al. 2025).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from circuits.attribution.effects import SiteEffects
from circuits.attribution.nodes import Nodes
from circuits.uncertainty.bootstrap import Bootstrap, group_sums
from circuits.uncertainty.intervals import strongest_values
from sae.model.sites import Site


def consistent_first(
    effects: Mapping[Site, SiteEffects], nodes: Nodes, *, groups: Tensor, bootstrap: Bootstrap | None = None
) -> Nodes:
    """The nodes by rank, the consistent ones before all others, each part by |effect|; those beyond the `CANDIDATES`
    strongest, of which nothing is drawn, come last. In place of its effect a node has what falls with the rank, from 1
    for the first to 1 / n for the last.
    """
    bootstrap = bootstrap or Bootstrap()
    values = strongest_values(effects, nodes, len(groups))[1]  # [B, n]
    sums = group_sums(values, groups)  # [G, n]
    mean = values.sum(0)
    same = [((counts @ sums).sign() == mean.sign()).float() for counts in bootstrap.counts(len(sums)).split(100)]
    consistent = torch.cat(same).mean(0) >= bootstrap.level  # a node that no drawn prompt has is not
    magnitude = torch.cat([of_site.effect.abs().double() for of_site in nodes.values()])
    strength = magnitude / magnitude.max()
    strongest = magnitude.argsort(descending=True, stable=True)[: len(mean)].sort().values  # in the order of `values`
    strength[strongest] = 1 + mean.abs().double() / mean.abs().max() + consistent  # above 2 for the consistent ones
    rank = torch.empty(len(strength))
    rank[strength.argsort(descending=True, stable=True)] = torch.arange(len(rank), 0, -1.0) / len(rank)
    ranked, sizes = {}, [len(of_site) for of_site in nodes.values()]
    for (site, of_site), of_nodes in zip(nodes.items(), rank.split(sizes), strict=True):
        order = of_nodes.argsort(descending=True)
        ranked[site] = replace(of_site[order], effect=of_nodes[order])
    return ranked
