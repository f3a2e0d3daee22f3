"""Stability of features over seeds: which features does another training find again?

1. Features that fire on a text are matched by decoder cosine (`sae.features.matching`), both ways.
2. Mean max cosine similarity (Sharkey et al. 2022), and the share of features with a mutual partner of at least
   `SAME` (as in Paulo & Belrose 2025, arXiv 2501.16615, who ask for .7).
3. Beside them what as many random directions would give.

A feature that never fires stays where it started, and says nothing about the data: it is left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.data.batches import counted_tokens, token_batches
from sae.data.text import TextSource
from sae.errors import UserError
from sae.features.matching import match_features, persistent_features
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

SAME = 0.7
Saes = Mapping[Site, SparseAutoencoder]


@dataclass(frozen=True)
class Stability:
    """How far two dictionaries of a site have the same features."""

    site: str
    """Site."""
    other: str
    """The other dictionary's run."""
    firing: tuple[int, int]
    """Features of each that fire."""
    similarity: float
    """Mean over features of the largest decoder cosine with a feature of the other dictionary."""
    back: float
    """The same from the other dictionary."""
    matched: float
    """Share of the features with a mutual partner of cosine .7 or more."""
    chance: float
    """Mean max cosine similarity of as many random directions."""


def feature_stability(
    model: LanguageModel,
    saes: Saes,
    others: Mapping[str, Saes],
    texts: str | Path | TextSource | Iterable[str],
    *,
    max_tokens: int = 50_000,
    batch_size: int = 16,
    context: int | None = None,
) -> list[Stability]:
    """Match the features of dictionaries with those of other trainings at the same sites.

    Args:
        model: the model they read.
        saes: the dictionaries by site.
        others: other dictionaries of these sites, by the name of their run.
        texts: text that tells which features fire.
        max_tokens, batch_size, context: as in `evaluate_saes`.

    Returns:
        An entry for each site and each other run that has a dictionary there.

    Raises:
        UserError: no site is in both, or the text is empty.
    """
    sites = [site for site in saes if any(site in other for other in others.values())]
    if not sites:
        raise UserError(f"none of the other autoencoders is at {', '.join(site.name for site in saes)}")
    runs = [saes, *others.values()]
    fires = _firing(model, runs, sites, texts, max_tokens, batch_size, context)
    results = []
    for site in sites:
        rows = saes[site].W_dec[fires[0][site]]
        for (name, other), fires_there in zip(others.items(), fires[1:], strict=True):
            if site in other:
                results.append(_stability(site, name, rows, other[site].W_dec[fires_there[site]]))
    return results


def _stability(site: Site, name: str, a: Tensor, b: Tensor) -> Stability:
    sizes = len(a), len(b)
    if not all(sizes):
        return Stability(site.name, name, sizes, *[float("nan")] * 4)
    there, back = match_features(a, b), match_features(b, a)
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(n, a.shape[1], generator=generator) for n in sizes]
    matched = len(persistent_features(there, threshold=SAME)) / len(a)
    return Stability(site.name, name, sizes, there.mean, back.mean, matched, match_features(*random).mean)


@torch.no_grad()
def _firing(
    model: LanguageModel, runs: Sequence[Saes], sites: Sequence[Site],
    texts: str | Path | TextSource | Iterable[str], max_tokens: int, batch_size: int, context: int | None,
) -> list[dict[Site, Tensor]]:  # fmt: skip
    """For each run and site whether each feature fires, [F] bool."""
    fires = [
        {site: torch.zeros(run[site].config.n_features, dtype=torch.bool, device=run[site].device) for site in sites
         if site in run} for run in runs
    ]  # fmt: skip
    reads = {run[site].config.read_site(site) for run in runs for site in sites if site in run}
    for tokens in token_batches(model, texts, max_tokens=max_tokens, batch_size=batch_size, context=context):
        tokens = tokens.to(model.device)
        counted = counted_tokens(model, tokens)
        activations = model.run(tokens, capture=reads, need_logits=False).activations
        for run, of_run in zip(runs, fires, strict=True):
            for site, fired in of_run.items():
                x = activations[run[site].config.read_site(site)][counted]
                fired[run[site].encode_sparse(x).feature] = True
    return fires
