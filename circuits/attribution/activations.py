"""Activations of every site on the clean and on the patch prompts, between which nodes are attributed.

Legend: B examples, S positions (left-padded), d model width.

1. One forward pass over the clean prompts and one over the patch prompts capture x at every site, and the metric m
   of both.
2. Without patch prompts the patch value of a site is `f = 0, e = 0`, that is `x = b_dec` (the reading of Marks et al.
   2024, section 3.1, for behaviours without counterfactual prompts).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from circuits._tensors import NOT_SAVED
from circuits.metrics.metrics import Metric
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.checks import check_finite
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes


@dataclass(frozen=True)
class ActivationPair:
    """Clean and patch activations of one batch of prompts at the circuit's sites."""

    prompts: PromptSet = field(metadata=NOT_SAVED)
    """The batch."""
    clean: dict[Site, Tensor]
    """x on the clean prompts, [B, S, d] per site."""
    patch: dict[Site, Tensor]
    """x on the patch prompts, [B, S, d]; `b_dec` everywhere where there are no patch prompts."""
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
        return ActivationPair(prompts, self.patch, self.clean, False, self.m_patch, self.m_clean, self.last_layer)

    @property
    def mask(self) -> Tensor:
        """[B, S] bool: real tokens, not padding."""
        return self.prompts.clean.attention_mask.bool()

    def resume(self, model: LanguageModel, site: Site, rows: Tensor) -> dict[Site, Tensor]:
        """The `skip` mapping with which examples `rows` [R] resume at a site from the clean run."""
        gathered: dict[int, Tensor] = {}
        skip = model.resume_from(site, self.clean)
        for x in skip.values():
            if id(x) not in gathered:
                gathered[id(x)] = x[rows]
        return {other: gathered[id(x)] for other, x in skip.items()}

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
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    metric: Metric,
    *,
    sites: Sequence[Site],
    gradient: bool = False,
) -> ActivationPair:
    """Run clean and patch prompts once and keep every site's activations; with `gradient` also dm/dx at the clean run.

    Raises `UserError` naming a site with NaN.
    """
    clean, m_clean, gradients = clean_run(model, prompts, metric, sites, gradient)
    if prompts.patch is None:
        biases = as_saes(saes)
        patch = {site: biases.bias(site).to(x).expand_as(x) for site, x in clean.items()}
        return ActivationPair(prompts, clean, patch, True, m_clean, None, model.n_layers - 1, gradients)
    other = model.run(prompts.patch, capture=sites, last_only=True)
    check_finite(other)
    with torch.no_grad():
        m_patch = metric(other.logits[:, -1], prompts)
    return ActivationPair(prompts, clean, other.activations, False, m_clean, m_patch, model.n_layers - 1, gradients)


def clean_run(
    model: LanguageModel, prompts: PromptSet, metric: Metric, sites: Sequence[Site], gradient: bool
) -> tuple[dict[Site, Tensor], Tensor, dict[Site, Tensor] | None]:
    """x at every site [B, S, d], m [B], and dm/dx per site if it was asked for."""
    with torch.set_grad_enabled(gradient):
        run = model.run(prompts.clean, capture=sites, last_only=True, grad=gradient)
        check_finite(run)
        m = metric(run.logits[:, -1], prompts)
        if not gradient:
            return run.activations, m, None
        gradients = torch.autograd.grad(m.sum(), [run.activations[site] for site in sites])
    activations = {site: x.detach() for site, x in run.activations.items()}
    return activations, m.detach(), dict(zip(sites, gradients, strict=True))


def metric_at(
    model: LanguageModel,
    states: ActivationPair,
    metric: Metric,
    *,
    site: Site,
    value: Tensor,
    copies: int,
    grad: bool,
) -> Tensor:
    """m with the site's output replaced by `value` [copies * B, S, d], everything before it taken from the clean
    run. [copies, B]
    """
    skip = model.resume_from(site, states.clean) | {site: value}
    run = model.run(states.tokens.repeat(copies), skip=skip, grad=grad, last_only=True)
    logits = run.logits[:, -1].unflatten(0, (copies, len(states.tokens)))
    return torch.stack([metric(rows, states.prompts) for rows in logits])


@torch.no_grad()
def site_total_effect(model: LanguageModel, states: ActivationPair, metric: Metric, *, site: Site) -> Tensor:
    """m(the site alone patched) - m(clean), [B]: what the effects of a site must add up to."""
    patched = metric_at(model, states, metric, site=site, value=states.patch[site], copies=1, grad=False)
    return patched[0] - states.m_clean
