"""Activations of every site on the clean and on the patch prompts, between which nodes are attributed.

Legend: B examples, S positions (left-padded), d model width.

1. One forward pass over the clean prompts and one over the patch prompts capture x at every site, and the metric m
   of both.
2. Without patch prompts the patch value of a site is `f = 0, e = 0`, that is `x = b_dec` (the reading of Marks et al.
   2024, section 3.1, for behaviours without counterfactual prompts).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from circuits._tensors import NOT_SAVED
from circuits.attribution.effects import SiteStates
from circuits.metrics.metrics import Metric, get_metric, prepare
from circuits.metrics.probe import read_by
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import READ_KINDS, Site
from sae.saes import SAEs, as_saes
from sae.splice import ensure_checked


@dataclass(frozen=True)
class Setting:
    """A metric of a model, and the SAEs whose features and errors explain it."""

    model: LanguageModel
    """The model as the metric reads it (`circuits.metrics.probe.read_by`)."""
    saes: SAEs
    """An autoencoder for every site."""
    metric: Metric
    """m(logits [B, V], prompts) -> [B]."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "saes", as_saes(self.saes))

    @staticmethod
    def of(
        model: LanguageModel,
        saes: Mapping[Site, SparseAutoencoder],
        metric: str | Metric = "logit_difference",
        *,
        sites: Iterable[Site] | None = None,
    ) -> Setting:
        """The SAEs of some sites, all by default, checked against the model, and a metric, by name or as it is."""
        m, saes = get_metric(metric), as_saes(saes)
        if sites is not None and (chosen := list(sites)) != list(saes):
            saes = saes.subset(chosen)
        ensure_checked(model, saes, saes)
        return Setting(read_by(model, m), saes, m)

    def prepare(self, prompts: PromptSet, *, differentiable: bool = False) -> PromptSet:
        """The prompts with what the metric compares with; see `circuits.metrics.metrics.prepare`."""
        return prepare(prompts, self.model, self.metric, differentiable=differentiable)


@dataclass(frozen=True)
class ActivationPair:
    """Clean and patch activations of one batch of prompts at the circuit's sites."""

    setting: Setting = field(metadata=NOT_SAVED)
    """The model they are of, its SAEs and the metric."""
    prompts: PromptSet = field(metadata=NOT_SAVED)
    """The batch."""
    clean: dict[Site, Tensor]
    """x on the clean prompts, [B, S, d] per site; and [B, S, r] at each place that a transcoder reads."""
    patch: dict[Site, Tensor]
    """The same on the patch prompts; where there are none `b_dec` everywhere, and zero at places that are read only."""
    zero_patch: bool
    """True where there are no patch prompts: its patch features are then 0 by definition."""
    m_clean: Tensor
    """The metric on the clean prompts, [B]."""
    m_patch: Tensor | None
    """The metric on the patch prompts with the clean prompts' answers, [B]; None without patch prompts."""
    last_layer: int | None = None
    """Number of the model's last block, of which the metric reads the last position alone."""
    gradients: dict[Site, Tensor] | None = None
    """dm/dx at the clean run, [B, S, d] per site, where it was asked for."""

    @property
    def tokens(self) -> Tokens:
        return self.prompts.clean

    @property
    def sites(self) -> list[Site]:
        """The sites whose activations are there, in forward order."""
        return [site for site in self.clean if site.kind not in READ_KINDS]

    def of_site(self, site: Site) -> SiteStates:
        """A site in both runs, with what its dictionary reads."""
        read = self.setting.saes.config(site).read_site(site)
        return SiteStates(self.clean[site], self.patch[site], self.clean[read], self.patch[read], self.zero_patch)

    def stored_without(self, sites: Collection[Site]) -> ActivationPair:
        """The same on the CPU, without the activations of these sites and without gradients."""

        def needed(activations: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
            return {site: x.cpu() for site, x in activations.items() if site not in sites}

        m_patch = None if self.m_patch is None else self.m_patch.cpu()
        clean, patch = needed(self.clean), needed(self.patch)
        return replace(self, clean=clean, patch=patch, m_clean=self.m_clean.cpu(), m_patch=m_patch, gradients=None)

    def reversed(self) -> ActivationPair:
        """The same batch from patch to clean, with the answers where they were: patching a node now restores its clean
        value in the patch run (denoising).
        """
        if self.prompts.patch is None or self.m_patch is None:
            raise UserError("denoising starts from the patch prompts: these prompts have no patch side")
        prompts = replace(self.prompts, clean=self.prompts.patch, patch=self.prompts.clean)
        return ActivationPair(
            self.setting, prompts, self.patch, self.clean, False, self.m_patch, self.m_clean, self.last_layer
        )

    @property
    def mask(self) -> Tensor:
        """[B, S] bool: real tokens, not padding."""
        return self.prompts.clean.attention_mask.bool()

    def metric_of_rows(self, site: Site, x: Tensor, rows: Tensor, *, grad: bool = False) -> Tensor:
        """m of examples `rows` [R] with x [R, S, d] at a site and everything before it from the clean run. [R]"""
        gathered: dict[int, Tensor] = {}
        model, metric = self.setting.model, self.setting.metric
        clean = model.resume_from(site, self.clean)
        for tensor in clean.values():
            if id(tensor) not in gathered:
                gathered[id(tensor)] = tensor[rows]
        skip = {other: gathered[id(tensor)] for other, tensor in clean.items()} | {site: x}
        run = model.run(self.tokens[rows], skip=skip, grad=grad, last_only=True)
        return metric(run.logits[:, -1], self.prompts[rows])

    def metric_of_copies(self, logits: Tensor) -> Tensor:
        """m from the logits [K * B, 1, V] of K copies of the batch, [K, B]."""
        copies = logits[:, -1].unflatten(0, (-1, len(self.tokens)))
        return torch.stack([self.setting.metric(rows, self.prompts) for rows in copies])

    def live(self, site: Site, gradient: Tensor) -> Tensor:
        """[B, S] bool: tokens through which edges of the site can run, given dm/dx there, [B, S, d].

        Tokens before the first that differs between the prompts are the same in both runs. In the last block, those
        without a gradient are not read by anything; elsewhere a gradient may be zero because paths cancel.
        """
        live = self.mask
        if self.prompts.patch is not None:
            clean, patch = self.prompts.clean, self.prompts.patch
            differ = (clean.input_ids != patch.input_ids) | (clean.attention_mask != patch.attention_mask)
            live = live & (differ.cumsum(1) > 0)
        if site.layer is not None and site.layer == self.last_layer:
            live = live & (gradient != 0).any(-1)
        return live


def capture_activations(
    setting: Setting, prompts: PromptSet, *, sites: Sequence[Site] | None = None, gradient: bool = False
) -> ActivationPair:
    """Run clean and patch prompts once and keep the activations of some sites, of all SAEs' sites by default, and of
    the places that transcoders read for them; with `gradient` also dm/dx at the clean run, at the sites.

    Raises `UserError` naming a site with NaN.
    """
    model, saes = setting.model, setting.saes
    sites = list(saes) if sites is None else sites
    clean, m_clean, gradients = clean_run(setting, prompts, sites, gradient)
    if prompts.patch is None:
        patch = nothing(setting, clean)
        return ActivationPair(setting, prompts, clean, patch, True, m_clean, None, model.n_layers - 1, gradients)
    other = model.run(prompts.patch, capture=with_reads(setting, sites), last_only=True)
    other.check_finite()
    with torch.no_grad():
        m_patch = setting.metric(other.logits[:, -1], prompts)
    return ActivationPair(
        setting, prompts, clean, other.activations, False, m_clean, m_patch, model.n_layers - 1, gradients
    )


def clean_run(
    setting: Setting, prompts: PromptSet, sites: Sequence[Site], gradient: bool
) -> tuple[dict[Site, Tensor], Tensor, dict[Site, Tensor] | None]:
    """x at every site [B, S, d] and at the places that transcoders read for them, m [B], and dm/dx per site if it was
    asked for.
    """
    with torch.set_grad_enabled(gradient):
        run = setting.model.run(prompts.clean, capture=with_reads(setting, sites), last_only=True, grad=gradient)
        run.check_finite()
        m = setting.metric(run.logits[:, -1], prompts)
        if not gradient:
            return run.activations, m, None
        gradients = run.gradients(m.sum(), sites)
    activations = {site: x.detach() for site, x in run.activations.items()}
    return activations, m.detach(), dict(zip(sites, gradients, strict=True))


def nothing(setting: Setting, clean: Mapping[Site, Tensor]) -> dict[Site, Tensor]:
    """The patch activations where there are no patch prompts: `b_dec` at every site, zero at places that are read."""
    return {
        site: torch.zeros_like(x) if site.kind in READ_KINDS else setting.saes.bias(site).to(x).expand_as(x)
        for site, x in clean.items()
    }


def with_reads(setting: Setting, sites: Sequence[Site]) -> set[Site]:
    """Some sites, and the places that their dictionaries read."""
    with_sae = [site for site in sites if site in setting.saes]
    return {*sites, *setting.saes.read_sites(with_sae).values()}


def metric_at(states: ActivationPair, value: Tensor, *, site: Site, grad: bool) -> Tensor:
    """m with the site's output replaced by `value` [K * B, S, d], all before it taken from the clean run. [K, B]"""
    model = states.setting.model
    skip = model.resume_from(site, states.clean) | {site: value}
    tokens = states.tokens.repeat(len(value) // len(states.tokens))
    return states.metric_of_copies(model.run(tokens, skip=skip, grad=grad, last_only=True).logits)


@torch.no_grad()
def site_total_effect(states: ActivationPair, *, site: Site) -> Tensor:
    """m(the site alone patched) - m(clean), [B]: what the effects of a site must add up to."""
    return metric_at(states, states.patch[site], site=site, grad=False)[0] - states.m_clean
