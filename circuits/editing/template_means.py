"""Means of features by place in the templates (or spans) of some prompts, over their clean and patch sides.

The same place is asked for by many edits of one trial: each feature is measured once, those that are asked for together
from the same passes.

Shapes: B prompts, S positions, m features of a site, G places in templates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from circuits.editing.site_edit import FeatureReader
from circuits.editing.targets import Features
from circuits.prompts.alignment import PositionGroups
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes

BATCH_SIZE = 64


@dataclass(frozen=True)
class TemplateMeans:
    """Means of some features of a site."""

    groups: PositionGroups
    """The places."""
    table: Tensor
    """[G, m] the means."""


class MeansByPlace:
    """The means of any features over some prompts."""

    def __init__(self, model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], prompts: PromptSet) -> None:
        self.model, self.saes, self.prompts = model, saes, prompts
        self._columns: dict[Site, dict[int, Tensor]] = {}  # [G] of each feature that was measured

    @cached_property
    def groups(self) -> PositionGroups:
        """The places of the prompts' tokens."""
        return PositionGroups(self.prompts)

    def of(self, features: Features) -> dict[Site, TemplateMeans]:
        """The means of some features, by site."""
        self.measure(features)
        tables = {
            site: torch.stack([self._columns[site][feature] for feature in index.tolist()], 1)
            for site, index in features.items()
        }
        return {site: TemplateMeans(self.groups, table) for site, table in tables.items()}

    def measure(self, features: Features) -> None:
        """Measure those of some features that were not measured before, all of them from the same passes."""
        lacking = {
            site: [feature for feature in index.tolist() if feature not in self._columns.get(site, {})]
            for site, index in features.items()
        }
        if chosen := {site: torch.tensor(of_site) for site, of_site in lacking.items() if of_site}:
            for site, table in self._tables(chosen).items():
                columns = zip(chosen[site].tolist(), table.unbind(1), strict=True)
                self._columns.setdefault(site, {}).update(columns)

    @torch.no_grad()
    def _tables(self, features: Features) -> dict[Site, Tensor]:
        """[G, m] the means of some features, by site."""
        readers = {site: FeatureReader(self.saes[site], index) for site, index in features.items()}
        device, reads = as_saes(self.saes).device, as_saes(self.saes).read_sites(features)
        sums = {site: torch.zeros(len(self.groups), len(index), device=device) for site, index in features.items()}
        counts = torch.zeros(len(self.groups), 1, device=device)
        for batch in self.prompts.batches(BATCH_SIZE):
            real = batch.clean.attention_mask.bool()
            group = self.groups.of(batch)[real].to(device)
            for tokens in [batch.clean] if batch.patch is None else [batch.clean, batch.patch]:
                run = self.model.run(tokens, capture=reads.values(), need_logits=False)
                counts.index_add_(0, group, torch.ones(len(group), 1, device=device))
                for site, read in reads.items():
                    sums[site].index_add_(0, group, readers[site](run.activations[read][real]).float())
        return {site: total / counts for site, total in sums.items()}
