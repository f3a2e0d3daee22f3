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
from typing import Any

from torch import Tensor

from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import ActivationPair, site_total_effect
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.baselines import activation_difference, random_effects
from circuits.attribution.effects import SiteEffects
from circuits.attribution.feature_effects import EdgeInputs, contract
from circuits.attribution.graddrop import gradients_with_layer_blocked, mean_magnitude
from circuits.attribution.ig_adaptive import adaptive_gradient, path_scale
from circuits.attribution.ig_inputs import integrated_gradients_of_inputs
from circuits.attribution.integrated_gradients import integrated_gradients
from circuits.attribution.nodes import positions_by
from circuits.attribution.relp import relevance_patching
from circuits.metrics.metrics import Metric
from circuits.options import METHODS, Aggregation
from sae.autoencoder import SparseAutoencoder
from sae.errors import unknown
from sae.model.forward import with_gradients
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

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

WITHOUT_GRADIENT = ("exact", "activation-difference", "random")
"""Methods that take no gradient for their effects."""
GRADIENT_AT_CLEAN = tuple(name for name in METHODS if name not in ("ig", "ig-inputs", "relp"))
"""Methods that take dm/dx at the clean run, for their effects or for the edges after them."""


@dataclass(frozen=True)
class Attribution:
    """Effects of one batch."""

    effects: dict[Site, SiteEffects]
    """Sparse effects per site; examples are numbered within the batch."""
    gradients: dict[Site, Tensor]
    """dm/dx per site, [B, S, d]: the method's own where it has one, at the clean run for the others."""
    site_totals: dict[Site, Tensor]
    """m(the site alone patched) - m(clean) per site, [B]; empty where they were not asked for."""
    path_nodes: dict[Site, float] = field(default_factory=dict)
    """Points of the path at which a prompt's gradient was taken, per site, mean over prompts; for `ig` and
    `ig-adaptive` (there without the clean end, which all sites share).
    """
    ends: dict[Site, EdgeInputs] = field(default_factory=dict)
    """What edges need of each site beside its gradient, where it was asked for and the effects were contracted."""


@dataclass(frozen=True, kw_only=True)
class AttributionOptions:
    """How node effects are estimated."""

    method: str = "ig"
    """One of `METHODS`."""
    rule: str = "midpoint"
    """Quadrature of `ig` and `ig-inputs`."""
    steps: int = 10
    """Quadrature nodes of `ig` and `ig-inputs`."""
    residual: float = 0.003
    """Completeness error `ig-adaptive` goes down to."""
    aggregation: Aggregation = "sum"
    """Which tokens are one node of a feature (see `positions_by`); with `spans` an effect's position is the
    number of its span.
    """
    max_rows: int = 512
    """Prompts that go through the model at once."""
    seed: int = 0
    """Seed of `random`."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)

    @property
    def along_path(self) -> bool:
        """Whether the gradient is taken along each site's own path, site by site."""
        return self.method in ("ig", "ig-adaptive")


@with_gradients
def attribute(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    states: ActivationPair,
    metric: Metric,
    *,
    sites: Sequence[Site],
    totals: bool = True,
    gradients: bool = True,
    ends: str | None = None,
    **options: Any,
) -> Attribution:
    """Node effects of every feature and error at `sites` for one batch; see `attribute_batches`. options: fields of
    `AttributionOptions`.
    """
    wanted = AttributionOptions(**options)
    return attribute_batches(
        model, saes, [states], metric, wanted, sites=sites, totals=totals, gradients=gradients, ends=ends
    )[0]


def attribute_batches(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    batches: Sequence[ActivationPair],
    metric: Metric,
    options: AttributionOptions,
    *,
    sites: Sequence[Site],
    totals: bool = True,
    gradients: bool = True,
    ends: str | None = None,
    progress: Callable[[Site], None] = lambda site: None,
) -> list[Attribution]:
    """Node effects of every feature and error at `sites`, batch by batch.

    totals: whether site totals are measured; gradients: whether dm/dx is taken for edges where the method does not use
    it; ends: keep what edges need, with features active where this says (see
    `contract`), if the method contracts a gradient; progress: called after each site of a batch. An autoencoder is
    asked for at its site's turn, for all batches one after the other (`graddrop` asks for all once a layer and batch).
    """
    found: list[Attribution] = []
    for states in batches:
        idle = options.method in WITHOUT_GRADIENT and not gradients
        slopes, effects = ({}, {}) if idle else _all_sites(model, saes, states, metric, sites, options)
        measured: dict[Site, Tensor] = {}
        path_nodes: dict[Site, float] = {}
        if totals or (options.method == "ig-adaptive" and states.m_patch is None):
            measured = {site: site_total_effect(model, states, metric, site=site) for site in sites}
        for site in sites if options.along_path else ():
            slopes[site], path_nodes[site] = _along_path(
                model, states, metric, site, options, at_clean=slopes, measured=measured
            )
            progress(site)
        found.append(Attribution(effects, slopes, measured, path_nodes))
    for site in sites:
        for states, batch in zip(batches, found, strict=True):
            _effects_of_site(model, saes, states, metric, site, options, batch, ends=ends)
            if not options.along_path:
                progress(site)
    return found


def _effects_of_site(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    states: ActivationPair,
    metric: Metric,
    site: Site,
    options: AttributionOptions,
    batch: Attribution,
    *,
    ends: str | None,
) -> None:
    """Put the effects of one site, and what edges need of it, into what was found of a batch."""
    method, positions = options.method, positions_by(options.aggregation, states.prompts)
    if method in WITHOUT_GRADIENT:
        batch.effects[site] = _without_gradient(model, saes[site], states, metric, site, options, positions)
    elif site not in batch.effects:
        batch.effects[site], known = contract(saes[site], states, batch.gradients[site], site=site, ends=ends)
        if known is not None:
            batch.ends[site] = known
    if positions is not None and method not in ("exact", "random"):  # these two have them already
        batch.effects[site] = batch.effects[site].at_positions(positions, states.tokens.lengths)


def _along_path(
    model: LanguageModel,
    states: ActivationPair,
    metric: Metric,
    site: Site,
    options: AttributionOptions,
    *,
    at_clean: Mapping[Site, Tensor],
    measured: Mapping[Site, Tensor],
) -> tuple[Tensor, float]:
    """Mean of dm/dx along the site's own path, [B, S, d], and the nodes a prompt took."""
    steps, max_rows = options.steps, options.max_rows
    if options.method == "ig":
        return integrated_gradients(
            model, states, metric, site=site, rule=options.rule, steps=steps, max_rows=max_rows
        ), steps
    return adaptive_gradient(
        model, states, metric, site=site, at_clean=at_clean[site], residual=options.residual,
        scale=path_scale(states, measured), max_rows=max_rows,
    )  # fmt: skip


def _without_gradient(
    model: LanguageModel,
    sae: SparseAutoencoder,
    states: ActivationPair,
    metric: Metric,
    site: Site,
    options: AttributionOptions,
    positions: Tensor | None,
) -> SiteEffects:
    """Effects of the methods that have no gradient of their own."""
    if options.method == "exact":
        return exact_effects(model, sae, states, metric, site=site, positions=positions, max_rows=options.max_rows)
    if options.method == "activation-difference":
        return activation_difference(sae, states, site=site)
    return random_effects(sae, states, site=site, positions=positions, seed=options.seed)


def _all_sites(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    states: ActivationPair,
    metric: Metric,
    sites: Sequence[Site],
    options: AttributionOptions,
) -> tuple[dict[Site, Tensor], dict[Site, SiteEffects]]:
    """What a method gets for all sites from the same passes: gradients, and effects where they are more than those
    contracted.
    """
    if options.method == "ig":
        return {}, {}
    if options.method == "ig-inputs":
        return integrated_gradients_of_inputs(
            model, states, metric, sites=sites, rule=options.rule, steps=options.steps, max_rows=options.max_rows
        ), {}
    if options.method == "relp":
        return relevance_patching(model, states, metric, sites=sites), {}
    gradients = dict(states.gradients or attribution_patching(model, states, metric, sites=sites))
    if options.method != "graddrop":
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
