"""One batch of prompts in, sparse node effects out, whatever the method.

1. Gradient methods give dm/dx at each site, some for all sites from the same passes, some site by site;
   `contract` turns it into effects of features and errors. `graddrop` combines several such effects.
2. `exact` patches node by node, the baselines need no gradient at all; edges after them use that at the clean run.
3. At each site the effects are held against the truth: m(the site alone patched) - m(clean). For integrated
   gradients the two agree up to the quadrature error (the sum check); for the other methods the gap says how
   nonlinear the path is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from circuits.attribution.activation_patching import exact_effects
from circuits.attribution.activations import ActivationPair, site_total_effect
from circuits.attribution.attribution_patching import attribution_patching
from circuits.attribution.baselines import activation_difference, random_effects
from circuits.attribution.effects import SiteEffects
from circuits.attribution.feature_effects import EdgeInputs, contract
from circuits.attribution.gim import gim_patching
from circuits.attribution.graddrop import gradients_with_layer_blocked, mean_magnitude
from circuits.attribution.ig_adaptive import adaptive_gradient, path_scale
from circuits.attribution.ig_inputs import check_embedding, integrated_gradients_of_inputs
from circuits.attribution.integrated_gradients import integrated_gradients
from circuits.attribution.nodes import positions_by
from circuits.attribution.relp import relevance_patching
from circuits.options import METHODS, EdgeActive, MethodOptions, members
from sae.model.forward import with_gradients
from sae.model.gim import check_covered
from sae.model.language_model import LanguageModel
from sae.model.lrp import check_conserved
from sae.model.sites import Site

METHOD_NAMES = {
    "ig": "integrated gradients",
    "ig-adaptive": "adaptive integrated gradients",
    "ig-inputs": "integrated gradients along the embedding path",
    "attrib": "attribution patching",
    "relp": "relevance patching",
    "gim": "gradient interaction modifications",
    "graddrop": "attribution patching with gradient drop",
    "exact": "exact activation patching",
    "activation-difference": "activation difference",
    "random": "random",
}
"""Every method with what it is called in words."""


def method_title(method: str) -> str:
    """A method in words; of an ensemble all that are in it."""
    names = [METHOD_NAMES.get(name, name) for name in members(method)]
    return names[0] if len(names) == 1 else f"the mean of {', '.join(names[:-1])} and {names[-1]}"


WITHOUT_GRADIENT = ("exact", "activation-difference", "random")
"""Methods that take no gradient for their effects."""
GRADIENT_AT_CLEAN = tuple(name for name in METHODS if name not in ("ig", "ig-inputs", "relp", "gim"))
"""Methods that take dm/dx at the clean run, for their effects or for the edges after them."""
ALONG_PATH = ("ig", "ig-adaptive")
"""Methods that take the gradient along each site's own path, site by site."""
CHECKS = {"relp": check_conserved, "gim": check_covered, "ig-inputs": check_embedding}
"""Methods that not every model allows, with what raises UserError for one that does not."""


def check_allowed(model: LanguageModel, method: str) -> None:
    """Raise UserError, before anything is computed, where a model does not allow a method, or one of an ensemble."""
    for name in members(method):
        if name in CHECKS:
            CHECKS[name](model)


@dataclass
class Attribution:
    """Effects of one batch, filled in site by site, and what the edges of the batch need."""

    states: ActivationPair
    """Activations of the batch."""
    effects: dict[Site, SiteEffects] = field(default_factory=dict)
    """Sparse effects per site; examples are numbered within the batch."""
    gradients: dict[Site, Tensor] = field(default_factory=dict)
    """dm/dx per site, [B, S, d]: the method's own where it has one, at the clean run for the others."""
    site_totals: dict[Site, Tensor] = field(default_factory=dict)
    """m(the site alone patched) - m(clean) per site, [B]; empty where they were not asked for."""
    path_nodes: dict[Site, float] = field(default_factory=dict)
    """Points of the path at which a prompt's gradient was taken, per site, mean over prompts; for `ig` and
    `ig-adaptive` (there without the clean end, which all sites share).
    """
    edge_inputs: dict[Site, EdgeInputs] = field(default_factory=dict)
    """Inputs of edges per site, where they were asked for and the method contracts a gradient."""

    def stored(self, numbers: Tensor) -> Attribution:
        """The same on the CPU for the edge pass, with example e called `numbers[e]`.

        Activations stay only of the sites whose features the edges encode again, and of none where there are no edge
        inputs: everything is then computed again.
        """
        inputs = {site: entry.to("cpu") for site, entry in self.edge_inputs.items()}
        left_out = [site for site in self.states.clean if not inputs or (site in inputs and inputs[site].has_acts)]
        return Attribution(
            states=self.states.stored_without(left_out),
            effects={site: effects.relabel_examples(numbers) for site, effects in self.effects.items()},
            gradients={site: g.detach().cpu() for site, g in self.gradients.items()},
            site_totals={site: total.cpu() for site, total in self.site_totals.items()},
            path_nodes=self.path_nodes,
            edge_inputs=inputs,
        )

    def without_edge_inputs(self) -> Attribution:
        """The same without anything that edges can compute again."""
        return replace(self, states=self.states.stored_without(list(self.states.clean)), edge_inputs={})

    @property
    def n_bytes_for_edges(self) -> int:
        """Memory of what edges could compute again."""
        activations = [*self.states.clean.values(), *self.states.patch.values()] if self.edge_inputs else []
        size = sum(x.numel() * x.element_size() for x in activations)
        return size + sum(inputs.n_bytes for inputs in self.edge_inputs.values())


@with_gradients
def attribute(
    states: ActivationPair,
    *,
    sites: Sequence[Site] | None = None,
    totals: bool = True,
    gradients: bool = True,
    active: EdgeActive | None = None,
    max_rows: int = 512,
    seed: int = 0,
    **options: Any,
) -> Attribution:
    """Node effects of every feature and error at `sites` for one batch.

    Args:
        options: fields of `MethodOptions`, such as `method="attrib"`; see `attribute_batches` for the others.
    """
    return attribute_batches(
        [states], MethodOptions(**options), sites=sites, totals=totals, gradients=gradients, active=active,
        max_rows=max_rows, seed=seed,
    )[0]  # fmt: skip


def attribute_batches(
    batches: Sequence[ActivationPair],
    options: MethodOptions,
    *,
    sites: Sequence[Site] | None = None,
    totals: bool = True,
    gradients: bool = True,
    active: EdgeActive | None = None,
    max_rows: int = 512,
    seed: int = 0,
    progress: Callable[[Site], None] = lambda site: None,
) -> list[Attribution]:
    """Node effects of every feature and error at `sites`, batch by batch.

    An autoencoder is asked for at its site's turn, for all batches one after the other (`graddrop` asks for all once a
    layer and batch).

    Args:
        batches: activations of each batch, with the model, SAEs and metric they are of.
        options: the method and its options.
        sites: in forward order; those of the activations by default.
        totals: whether site totals are measured.
        gradients: whether dm/dx is taken for edges where the method does not use it.
        active: keep the inputs of edges, with features active where this says, if the method contracts a gradient.
        max_rows: prompts that go through the model at once.
        seed: seed of `random`.
        progress: called after each site of a batch.
    """
    sites = batches[0].sites if sites is None and batches else sites or ()
    method = _Method(options, max_rows, seed)
    results: list[Attribution] = []
    for states in batches:
        result = Attribution(states)
        if gradients or options.method not in WITHOUT_GRADIENT:
            result.gradients, result.effects = method.at_all_sites(states, sites)
        if totals or (options.method == "ig-adaptive" and states.m_patch is None):
            result.site_totals = {site: site_total_effect(states, site=site) for site in sites}
        for site in sites if options.method in ALONG_PATH else ():
            result.gradients[site], result.path_nodes[site] = method.along_path(result, site)
            progress(site)
        results.append(result)
    for site in sites:
        for result in results:
            method.add_effects(result, site, active)
            if options.method not in ALONG_PATH:
                progress(site)
    return results


@dataclass(frozen=True)
class _Method:
    """A node method with its options."""

    options: MethodOptions
    max_rows: int
    seed: int

    def at_all_sites(
        self, states: ActivationPair, sites: Sequence[Site]
    ) -> tuple[dict[Site, Tensor], dict[Site, SiteEffects]]:
        """Gradients that come for all sites from the same passes, and effects where they are more than those
        contracted.
        """
        options = self.options
        if options.method == "ig":
            return {}, {}
        if options.method == "ig-inputs":
            return integrated_gradients_of_inputs(
                states, sites=sites, rule=options.rule, steps=options.steps, max_rows=self.max_rows
            ), {}
        if options.method == "relp":
            return relevance_patching(states, sites=sites), {}
        if options.method == "gim":
            return gim_patching(states, sites=sites), {}
        gradients = dict(states.gradients or attribution_patching(states, sites=sites))
        return gradients, _gradient_drop(states, sites, gradients) if options.method == "graddrop" else {}

    def along_path(self, result: Attribution, site: Site) -> tuple[Tensor, float]:
        """Mean of dm/dx along the site's own path, [B, S, d], and the nodes a prompt took."""
        states, options = result.states, self.options
        if options.method == "ig":
            return integrated_gradients(
                states, site=site, rule=options.rule, steps=options.steps, max_rows=self.max_rows
            ), options.steps
        return adaptive_gradient(
            states, site=site, at_clean=result.gradients[site], residual=options.residual,
            scale=path_scale(states, result.site_totals), max_rows=self.max_rows,
        )  # fmt: skip

    def add_effects(self, result: Attribution, site: Site, active: EdgeActive | None) -> None:
        """Add the effects of one site, and the inputs of its edges, to the result of a batch."""
        method, states, effects = self.options.method, result.states, result.effects
        positions = positions_by(self.options.aggregation, states.prompts)
        if method == "exact":
            effects[site] = exact_effects(states, site=site, positions=positions, max_rows=self.max_rows)
        elif method == "random":
            effects[site] = random_effects(states, site=site, positions=positions, seed=self.seed)
        elif method == "activation-difference":
            effects[site] = activation_difference(states, site=site)
        elif site not in effects:
            effects[site], inputs = contract(states, result.gradients[site], site=site, active=active)
            if inputs is not None:
                result.edge_inputs[site] = inputs
        if positions is not None and method not in ("exact", "random"):  # these two have them already
            effects[site] = effects[site].at_positions(positions, states.tokens.lengths)


def _gradient_drop(
    states: ActivationPair, sites: Sequence[Site], gradients: Mapping[Site, Tensor]
) -> dict[Site, SiteEffects]:
    """The effects of `graddrop`; those at the clean run at a site that is inside every layer that is blocked."""
    by_layer: dict[Site, list[SiteEffects]] = {site: [] for site in sites}
    for _, of_layer in gradients_with_layer_blocked(states, sites=sites):
        for site, gradient in of_layer.items():
            by_layer[site].append(contract(states, gradient, site=site)[0])
    return {
        site: mean_magnitude(effects) if effects else contract(states, gradients[site], site=site)[0]
        for site, effects in by_layer.items()
    }
