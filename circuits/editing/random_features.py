"""Random features to compare an edit with: as many, active on the same prompts, none of them edited; or of a circuit,
as many and of the same summed |effect|.

Shapes: B prompts, S positions, n features of a site.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from circuits.editing.targets import EVERYWHERE, Features, counted_inputs, tokens_at
from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.saes import as_saes


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
    reads = as_saes(saes).read_sites(saes)
    for batch in prompts.batches(batch_size):
        for site, x in counted_inputs(model, batch.clean, reads, tokens_at(batch, span)).items():
            active[site].append(saes[site].encode_sparse(x).feature.unique())
    return {site: torch.cat(of_batches).unique().cpu() for site, of_batches in active.items()}


def random_features(
    active: Features, like: Features, *, generator: torch.Generator, same_sites: bool = True
) -> dict[Site, Tensor]:
    """Draw as many active features as in `like`, none of them in `like`, uniformly without replacement.

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


CLOSE = 0.01
"""A draw of the same effect differs from it by at most this share, where the circuit has such features."""
EXCHANGES = 100
"""Features that are exchanged at most to bring a draw there."""


@dataclass(frozen=True)
class EffectDraw:
    """Features of a circuit that are as many as those edited, and of nearly the same summed |effect|."""

    features: list[str]
    """Their names, `resid_3/120@subject`."""
    share: float
    """Their summed |effect| over that of the edited ones."""


def draws_of_equal_effect(
    effects: Mapping[str, float], like: Sequence[str], *, n_draws: int, seed: int
) -> list[EffectDraw]:
    """Draw groups of a circuit's features that a group of them is compared with.

    A draw starts from features taken at random, and exchanges one at a time for that which brings the sum nearest.

    Args:
        effects: Effect of each feature of the circuit, by name.
        like: The group; none of it is drawn.
        n_draws: How many draws.
        seed: Seed of the draws.

    Returns:
        The draws, none of them twice; none at all where the circuit has too few other features, or not those of `like`.
    """
    names = [name for name, effect in effects.items() if effect and name not in set(like)]
    if not like or not set(like) <= set(effects) or len(names) < len(like):
        return []
    sizes = torch.tensor([abs(effects[name]) for name in names], dtype=torch.float64)
    target = sum(abs(effects[name]) for name in like)
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        tuple(_near(sizes, target, torch.randperm(len(names), generator=generator), len(like)))
        for _ in range(n_draws if target else 0)
    }
    return [
        EffectDraw([names[i] for i in chosen], float(sizes[list(chosen)].sum()) / target) for chosen in sorted(drawn)
    ]


def _near(sizes: Tensor, target: float, order: Tensor, n: int) -> list[int]:
    """n of the numbers whose sum is near the target, from the first of a random order on."""
    inside, outside = order[:n].clone(), order[n:].clone()
    for _ in range(EXCHANGES):
        missing = target - sizes[inside].sum()
        if missing.abs() <= CLOSE * target or not len(outside):
            break
        after = (missing - sizes[outside][None] + sizes[inside][:, None]).abs()  # [n, rest]
        index = int(after.argmin())
        row, column = divmod(index, len(outside))
        if after.flatten()[index] >= missing.abs():
            break
        inside[row], outside[column] = outside[column].clone(), inside[row].clone()
    return sorted(inside.tolist())
