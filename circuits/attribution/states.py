"""The two ends of an attribution: activations of every site on the clean and on the patch prompts.

Legend: B examples, S positions (left-padded), d model width.

1. One forward pass over the clean prompts and one over the patch prompts capture x at every site, and the metric m
   of both.
2. Without patch prompts the patch end of a site is `f = 0, e = 0`, that is `x = b_dec` (the reading of Marks et al.
   2024, section 3.1, for behaviours without counterfactual prompts).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from circuits.behaviour import Metric
from circuits.prompts import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model import LanguageModel, Tokens, check_finite
from sae.sites import Site
from sae.streaming import decoder_bias


@dataclass(frozen=True)
class States:
    """Clean and patch activations of one batch of prompts at the circuit's sites."""

    prompts: PromptSet
    """The batch."""
    clean: dict[Site, torch.Tensor]
    """x on the clean prompts, [B, S, d] per site."""
    patch: dict[Site, torch.Tensor]
    """x on the patch prompts, [B, S, d]; `b_dec` everywhere where there are no patch prompts."""
    zero_patch: bool
    """True where there are no patch prompts: the features of the patch end are then 0 by definition."""
    m_clean: torch.Tensor
    """The metric on the clean prompts, [B]."""
    m_patch: torch.Tensor | None
    """The metric on the patch prompts with the clean prompts' answers, [B]; None without patch prompts."""

    @property
    def tokens(self) -> Tokens:
        return self.prompts.clean

    def reversed(self) -> States:
        """The same batch from patch to clean, with the answers where they were: patching a node now restores its clean
        value in the patch run (denoising).
        """
        if self.prompts.patch is None or self.m_patch is None:
            raise UserError("denoising starts from the patch prompts: these prompts have no patch side")
        prompts = replace(self.prompts, clean=self.prompts.patch, patch=self.prompts.clean)
        return States(prompts, self.patch, self.clean, False, self.m_patch, self.m_clean)

    def places(self, aggregation: str) -> torch.Tensor | None:
        """[B, S] int64: tokens of a prompt with equal number are one node of a feature; None where all of them are.

        Token positions, or the numbers of the spans; what stands at padding means nothing.
        """
        if aggregation == "sum":
            return None
        if aggregation == "position":
            return self.prompts.clean.position_ids
        return self.prompts.span_numbers(self.prompts.spans)

    @property
    def mask(self) -> torch.Tensor:
        """[B, S] bool: real tokens, not padding."""
        return self.prompts.clean.attention_mask.bool()


def capture_states(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    metric: Metric,
    *,
    sites: Sequence[Site],
) -> States:
    """Run clean and patch prompts once and keep every site's activations. Raises `UserError` naming a site with NaN."""
    clean = model.run(prompts.clean, capture=sites, last_only=True)
    check_finite(clean)
    m_clean = metric(clean.logits[:, -1], prompts)
    if prompts.patch is None:
        patch = {
            site: decoder_bias(saes, site).to(clean.activations[site]).expand_as(clean.activations[site])
            for site in sites
        }
        return States(prompts, clean.activations, patch, True, m_clean, None)
    other = model.run(prompts.patch, capture=sites, last_only=True)
    check_finite(other)
    return States(prompts, clean.activations, other.activations, False, m_clean, metric(other.logits[:, -1], prompts))
