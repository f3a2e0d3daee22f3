"""Random features to compare an edit with: as many, active on the same prompts, none of them edited.

Shapes: B prompts, S positions, n features of a site.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from circuits.editing.targets import EVERYWHERE, Features, counted_activations, tokens_at
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site


def active_features(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    *,
    span: str = EVERYWHERE,
    batch_size: int = 64,
) -> dict[Site, Tensor]:
    """Features that are active on at least one token of the clean prompts (special tokens aside), by site; span: on
    at least one of its tokens.
    """
    active: dict[Site, list[Tensor]] = {site: [] for site in saes}
    for batch in prompts.batches(batch_size):
        for site, x in counted_activations(model, batch.clean, saes, tokens_at(batch, span)).items():
            active[site].append(saes[site].encode_sparse(x).feature.unique())
    return {site: torch.cat(of_batches).unique().cpu() for site, of_batches in active.items()}


def random_features(
    active: Features, like: Features, *, generator: torch.Generator, same_sites: bool = True
) -> dict[Site, Tensor]:
    """As many active features as in `like`, none of them in `like`, drawn uniformly without replacement.

    same_sites: as many at each site as `like` has there; otherwise from all sites together, where the sites of many
    active features get many.
    """
    pools = {site: index[~torch.isin(index, like[site])] if site in like else index for site, index in active.items()}
    if same_sites:
        drawn = {site: _draw(pools[site], len(index), generator) for site, index in like.items()}
        return {site: index for site, index in drawn.items() if len(index)}
    owners = torch.cat([torch.full((len(index),), rank) for rank, index in enumerate(pools.values())])
    pooled = torch.cat(list(pools.values()))
    chosen = _draw(torch.arange(len(pooled)), sum(map(len, like.values())), generator)
    drawn = {site: pooled[chosen[owners[chosen] == rank]] for rank, site in enumerate(pools)}
    return {site: index for site, index in drawn.items() if len(index)}


def _draw(pool: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return pool[torch.randperm(len(pool), generator=generator)[:n]].sort().values
