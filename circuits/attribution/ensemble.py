"""Ensembles of node methods: the mean of their scores, each normalised (LMU's entry to MIB, Mueller et al. 2025).

Legend: M methods.

1. Each method's effects are divided by its norm, the sum of |effect| over all nodes once prompts (and positions) are
   aggregated, so that no method outweighs another by its scale.
2. The mean over methods is multiplied with the mean norm: effects stay in units of the metric.
3. Edges take the gradient put together by the same weights: contracted with a node's change it gives its effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from circuits.attribution.effects import SiteEffects
from circuits.attribution.node_effects import Attribution
from circuits.attribution.nodes import Nodes, SiteNodes
from sae.errors import UserError
from sae.model.sites import Site


def ensemble_weights(nodes: Sequence[Nodes]) -> list[float]:
    """The factor of each method's effects in the mean, from its aggregated nodes. `UserError` without effects."""
    norms = [sum(float(of_site.effect.abs().sum()) for of_site in of_method.values()) for of_method in nodes]
    if not all(norms):
        raise UserError("a method of the ensemble finds no node with an effect: leave it out")
    mean = sum(norms) / len(norms)
    return [mean / norm / len(norms) for norm in norms]


def weighted_effects(
    methods: Sequence[Mapping[Site, SiteEffects]], weights: Sequence[float]
) -> dict[Site, SiteEffects]:
    """The effects of an ensemble on every prompt."""
    return {
        site: _merged(
            SiteEffects.concatenate(
                replace(of_method[site], value=weight * of_method[site].value)
                for of_method, weight in zip(methods, weights, strict=True)
            )
        )
        for site in methods[0]
    }


def combined_batches(members: Sequence[Sequence[Attribution]], weights: Sequence[float]) -> list[Attribution]:
    """The batches of all methods as those of the ensemble; inputs of edges are left to be computed again."""
    return [_combined(batch, weights) for batch in zip(*members, strict=True)]


def _combined(batch: Sequence[Attribution], weights: Sequence[float]) -> Attribution:
    gradients = {
        site: torch.stack([weight * one.gradients[site] for one, weight in zip(batch, weights, strict=True)]).sum(0)
        for site in batch[0].gradients
    }
    effects = weighted_effects([one.effects for one in batch], weights)
    return replace(batch[0], effects=effects, gradients=gradients, path_nodes={}, edge_inputs={})


def _merged(effects: SiteEffects) -> SiteEffects:
    """One entry for each node of an example, the sum of all it has."""
    columns = torch.stack([effects.example, effects.position, effects.feature])
    (example, position, feature), entry = columns.unique(dim=1, return_inverse=True)
    value = torch.zeros(len(example), dtype=torch.float64).index_add_(0, entry, effects.value.double())
    return SiteEffects(effects.n_features, example, position, feature, value.float())


def combined_nodes(nodes: Sequence[Nodes]) -> Nodes:
    """The nodes of an ensemble from those of its methods, positions summed, strongest first."""
    weights = ensemble_weights(nodes)
    return {site: _combined_site(site, nodes, weights) for site in nodes[0]}


def _combined_site(site: Site, nodes: Sequence[Mapping[Site, SiteNodes]], weights: Sequence[float]) -> SiteNodes:
    n_features = nodes[0][site].n_features
    effect = torch.zeros(n_features + 2)  # with the error and the skip connection
    for of_method, weight in zip(nodes, weights, strict=True):
        effect.index_add_(0, of_method[site].feature, weight * of_method[site].effect)
    feature = effect.abs().argsort(descending=True, stable=True)
    feature = feature[effect[feature] != 0]
    return SiteNodes(n_features, feature, torch.full_like(feature, -1), effect[feature])
