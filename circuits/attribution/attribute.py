"""One batch of prompts in, sparse node effects out, whatever the method.

1. Gradient methods (`attrib`, `ig`) give dm/dx at each site; `contract_gradient` turns it into effects of features
   and errors.
2. `exact` patches node by node; its edges use the gradient at the clean run.
3. At each site the effects are held against the truth: m(the site alone patched) - m(clean). For integrated
   gradients the two agree up to the quadrature error (completeness); for attribution patching the gap says how
   nonlinear the path is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from circuits.attribution.effects import SiteEffects, contract_gradient
from circuits.attribution.exact import exact_effects
from circuits.attribution.gradients import attribution_patching, integrated_gradients, site_total_effect
from circuits.attribution.states import States
from circuits.behaviour import Metric
from sae.autoencoder import SparseAutoencoder
from sae.errors import unknown
from sae.model import LanguageModel
from sae.sites import Site

METHODS = ("ig", "attrib", "exact")


@dataclass(frozen=True)
class Attribution:
    """Effects of one batch."""

    effects: dict[Site, SiteEffects]
    """Sparse effects per site; examples are numbered within the batch."""
    gradients: dict[Site, torch.Tensor]
    """dm/dx per site, [B, S, d]: averaged along the path for `ig`, at the clean run for the others."""
    site_totals: dict[Site, torch.Tensor]
    """m(the site alone patched) - m(clean) per site, [B]."""


def attribute(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    states: States,
    metric: Metric,
    *,
    sites: Sequence[Site],
    method: str = "ig",
    rule: str = "midpoint",
    steps: int = 10,
    joint_positions: bool = True,
    max_rows: int = 512,
    progress: Callable[[Site], None] = lambda site: None,
) -> Attribution:
    """Node effects of every feature and error at `sites` for one batch.

    method: `ig`, `attrib` or `exact`; rule, steps: the quadrature of `ig`; joint_positions: `exact` patches a
    feature at all positions at once (what a node means under aggregation `sum`); max_rows: prompts that go through
    the model at once; progress: called after each site.
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    gradients = {} if method == "ig" else attribution_patching(model, states, metric, sites=sites)
    effects, totals = {}, {}
    for site in sites:
        if method == "ig":
            gradients[site] = integrated_gradients(
                model, states, metric, site=site, rule=rule, steps=steps, max_rows=max_rows
            )
        if method == "exact":
            effects[site] = exact_effects(
                model, saes[site], states, metric, site=site, joint=joint_positions, max_rows=max_rows
            )
        else:
            effects[site] = contract_gradient(
                saes[site],
                states.clean[site],
                states.patch[site],
                gradients[site],
                mask=states.mask,
                zero_patch=states.zero_patch,
            )
        totals[site] = site_total_effect(model, states, metric, site=site)
        progress(site)
    return Attribution(effects, gradients, totals)
