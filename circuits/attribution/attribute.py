"""One batch of prompts in, sparse node effects out, whatever the method.

1. Gradient methods give dm/dx at each site, some for all sites from the same passes, some site by site;
   `contract` turns it into effects of features and errors. `graddrop` combines several such effects.
2. `exact` patches node by node, the baselines need no gradient at all; edges after them use that at the clean run.
3. At each site the effects are held against the truth: m(the site alone patched) - m(clean). For integrated
   gradients the two agree up to the quadrature error (completeness); for the other methods the gap says how
   nonlinear the path is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from circuits.attribution.adaptive import adaptive_gradient, path_scale
from circuits.attribution.baselines import activation_difference, random_effects
from circuits.attribution.contraction import SiteEnds, contract
from circuits.attribution.effects import SiteEffects
from circuits.attribution.exact import exact_effects
from circuits.attribution.graddrop import gradients_with_layer_blocked, mean_magnitude
from circuits.attribution.gradients import attribution_patching, integrated_gradients, site_total_effect
from circuits.attribution.ig_inputs import integrated_gradients_of_inputs
from circuits.attribution.relp import relevance_patching
from circuits.attribution.states import States
from circuits.behaviour import Metric
from sae.autoencoder import SparseAutoencoder
from sae.errors import unknown
from sae.model import LanguageModel
from sae.sites import Site

METHOD_NAMES = {
    "ig": "integrated gradients",
    "ig-adaptive": "adaptive integrated gradients",
    "ig-inputs": "integrated gradients along the embedding path",
    "attrib": "attribution patching",
    "relp": "relevance patching",
    "graddrop": "attribution patching with gradient drop",
    "exact": "exact activation patching",
    "activation-difference": "activation difference",
    "random": "random",
}
"""Every method with what it is called in words."""

METHODS = tuple(METHOD_NAMES)

GRADIENT_AT_CLEAN = tuple(name for name in METHODS if name not in ("ig", "ig-inputs", "relp"))
"""Methods that take dm/dx at the clean run, for their effects or for the edges after them."""


@dataclass(frozen=True)
class Attribution:
    """Effects of one batch."""

    effects: dict[Site, SiteEffects]
    """Sparse effects per site; examples are numbered within the batch."""
    gradients: dict[Site, torch.Tensor]
    """dm/dx per site, [B, S, d]: the method's own where it has one, at the clean run for the others."""
    site_totals: dict[Site, torch.Tensor]
    """m(the site alone patched) - m(clean) per site, [B]; empty where they were not asked for."""
    path_nodes: dict[Site, float] = field(default_factory=dict)
    """Points of the path at which a prompt's gradient was taken, per site, mean over prompts; for `ig` and
    `ig-adaptive` (there without the clean end, which all sites share).
    """
    ends: dict[Site, SiteEnds] = field(default_factory=dict)
    """What edges need of each site beside its gradient, where it was asked for and the effects were contracted."""


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
    residual: float = 0.003,
    aggregation: str = "sum",
    max_rows: int = 512,
    seed: int = 0,
    totals: bool = True,
    ends: str | None = None,
    progress: Callable[[Site], None] = lambda site: None,
) -> Attribution:
    """Node effects of every feature and error at `sites` for one batch.

    method: one of `METHODS`; rule, steps: the quadrature of `ig` and `ig-inputs`; residual: the completeness error
    `ig-adaptive` goes down to; aggregation: which tokens are one node of a feature (see `States.places`; with `spans`
    an effect's position is the number of its span); max_rows: prompts that go through the model at once; seed: of
    `random`; totals: whether site totals are measured; ends: keep what edges need, with features active where this says
    (see `contract`), if the method contracts a gradient; progress: called after each site.
    """
    return attribute_batches(
        model, saes, [states], metric, sites=sites, method=method, rule=rule, steps=steps, residual=residual,
        aggregation=aggregation, max_rows=max_rows, seed=seed, totals=totals, ends=ends, progress=progress,
    )[0]  # fmt: skip


def attribute_batches(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    batches: Sequence[States],
    metric: Metric,
    *,
    sites: Sequence[Site],
    method: str = "ig",
    rule: str = "midpoint",
    steps: int = 10,
    residual: float = 0.003,
    aggregation: str = "sum",
    max_rows: int = 512,
    seed: int = 0,
    totals: bool = True,
    ends: str | None = None,
    progress: Callable[[Site], None] = lambda site: None,
) -> list[Attribution]:
    """What `attribute` does, for several batches: an autoencoder is asked for at its site's turn, for all of them one
    after the other (`graddrop` asks for all once a layer and batch).
    """
    if method not in METHODS:
        raise unknown("method", method, METHODS)
    along_path = method in ("ig", "ig-adaptive")
    found: list[Attribution] = []
    for states in batches:
        gradients, effects = _all_sites(model, saes, states, metric, sites, method, rule, steps, max_rows)
        measured: dict[Site, torch.Tensor] = {}
        path_nodes: dict[Site, float] = {}
        if totals or (method == "ig-adaptive" and states.m_patch is None):
            measured = {site: site_total_effect(model, states, metric, site=site) for site in sites}
        for site in sites if along_path else ():
            gradients[site], path_nodes[site] = _along_path(
                model, states, metric, site, method, rule, steps, residual, gradients.get(site), measured, max_rows
            )
            progress(site)
        found.append(Attribution(effects, gradients, measured, path_nodes))
    for site in sites:
        for states, batch in zip(batches, found, strict=True):
            _effects_of_site(model, saes, states, metric, site, batch, method, aggregation, max_rows, seed, ends)
            if not along_path:
                progress(site)
    return found


def _effects_of_site(
    model, saes, states: States, metric, site: Site, batch: Attribution, method, aggregation, max_rows, seed, ends
) -> None:
    """Put the effects of one site, and what edges need of it, into what was found of a batch."""
    places = states.places(aggregation)
    if method in ("exact", "activation-difference", "random"):
        batch.effects[site] = _without_gradient(model, saes[site], states, metric, site, method, places, max_rows, seed)
    elif site not in batch.effects:
        batch.effects[site], known = contract(saes[site], states, batch.gradients[site], site=site, ends=ends)
        if known is not None:
            batch.ends[site] = known
    if places is not None and method not in ("exact", "random"):  # these two know places already
        batch.effects[site] = batch.effects[site].at_places(places, states.tokens.lengths)


def _along_path(
    model, states, metric, site, method, rule, steps, residual, at_clean, measured, max_rows
) -> tuple[torch.Tensor, float]:
    """Mean of dm/dx along the site's own path, [B, S, d], and the nodes a prompt took."""
    if method == "ig":
        gradient = integrated_gradients(model, states, metric, site=site, rule=rule, steps=steps, max_rows=max_rows)
        return gradient, steps
    return adaptive_gradient(
        model, states, metric, site=site, at_clean=at_clean, residual=residual, scale=path_scale(states, measured),
        max_rows=max_rows,
    )  # fmt: skip


def _without_gradient(model, sae, states, metric, site, method, places, max_rows, seed) -> SiteEffects:
    """Effects of the methods that have no gradient of their own."""
    if method == "exact":
        return exact_effects(model, sae, states, metric, site=site, places=places, max_rows=max_rows)
    if method == "activation-difference":
        return activation_difference(sae, states, site=site)
    return random_effects(sae, states, site=site, places=places, seed=seed)


def _all_sites(
    model, saes, states, metric, sites, method, rule, steps, max_rows
) -> tuple[dict[Site, torch.Tensor], dict[Site, SiteEffects]]:
    """What a method gets for all sites from the same passes: gradients, and effects where they are more than those
    contracted.
    """
    if method == "ig":
        return {}, {}
    if method == "ig-inputs":
        return integrated_gradients_of_inputs(
            model, states, metric, sites=sites, rule=rule, steps=steps, max_rows=max_rows
        ), {}
    if method == "relp":
        return relevance_patching(model, states, metric, sites=sites), {}
    gradients = dict(states.gradients or attribution_patching(model, states, metric, sites=sites))
    if method != "graddrop":
        return gradients, {}
    parts: dict[Site, list[SiteEffects]] = {site: [] for site in sites}
    for _, found in gradients_with_layer_blocked(model, states, metric, sites=sites):
        for site, gradient in found.items():
            parts[site].append(contract(saes[site], states, gradient, site=site)[0])
    effects = {
        site: mean_magnitude(of_site) if of_site else contract(saes[site], states, gradients[site], site=site)[0]
        for site, of_site in parts.items()
    }
    return gradients, effects
