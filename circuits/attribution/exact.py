"""Exact activation patching: what the estimates estimate, one forward pass a node.

Legend: B examples, S positions, d model width, F features; feature F is the error node.

For every node that differs between the clean and the patch run:
1. put x + (f_patch - f_clean)_i W_dec[i] (for the error: x + e_patch - e_clean) in place of x at its site, in the
   clean run,
2. effect = m(that run) - m(clean).

`joint` patches a feature at all positions of an example at once, which is what a node means in aggregation `sum`;
otherwise each (position, feature) is patched alone. Rows are batched and resume from the cached clean activations,
so the cost is one partial forward pass for every (example, [position,] feature) that is active in either run.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from circuits.attribution.effects import SiteEffects, feature_deltas, token_chunks
from circuits.attribution.states import States
from circuits.behaviour import Metric
from sae.autoencoder import SparseAutoencoder
from sae.model import LanguageModel
from sae.sites import Site


@torch.no_grad()
def _differing_nodes(
    sae: SparseAutoencoder, states: States, site: Site
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(token, feature, f_patch - f_clean) of all features that differ, tokens numbered over [B * S]; padding left
    out.
    """
    clean, patch = states.clean[site].flatten(0, 1).float(), states.patch[site].flatten(0, 1).float()
    real = states.mask.flatten()
    tokens, features, values = [], [], []
    for chunk in token_chunks(len(clean), sae.W_dec.shape[0]):
        delta = feature_deltas(sae, clean[chunk], patch[chunk], zero_patch=states.zero_patch)
        delta *= real[chunk, None]
        token, feature = delta.nonzero(as_tuple=True)
        tokens.append(token + chunk.start)
        features.append(feature)
        values.append(delta[token, feature])
    return torch.cat(tokens), torch.cat(features), torch.cat(values)


def _error_delta(sae: SparseAutoencoder, states: States, site: Site, token, feature, value) -> torch.Tensor:
    """e_patch - e_clean = (x_patch - x_clean) - sum_i (f_patch - f_clean)_i W_dec[i], [B * S, d]."""
    delta = (states.patch[site] - states.clean[site]).flatten(0, 1).float() * states.mask.flatten()[:, None]
    for start in range(0, len(token), 2**16):
        part = slice(start, start + 2**16)
        delta.index_add_(0, token[part], value[part, None] * sae.W_dec[feature[part]], alpha=-1)
    return delta


@torch.no_grad()
def exact_effects(
    model: LanguageModel,
    sae: SparseAutoencoder,
    states: States,
    metric: Metric,
    *,
    site: Site,
    joint: bool,
    features: torch.Tensor | None = None,
    max_rows: int = 512,
) -> SiteEffects:
    """Exact effects of one site's nodes. `features` ([n] int64, F for the error) restricts the work to a chosen set
    of nodes.
    """
    n_positions = states.mask.shape[1]
    n_features = sae.W_dec.shape[0]
    token, feature, value = _differing_nodes(sae, states, site)
    error = _error_delta(sae, states, site, token, feature, value)
    error_token = (error != 0).any(-1).nonzero()[:, 0]
    if features is not None:
        features = features.to(feature.device)
        kept = torch.isin(feature, features)
        token, feature, value = token[kept], feature[kept], value[kept]
        error_token = error_token if bool((features == n_features).any()) else error_token[:0]
    token = torch.cat([token, error_token])
    feature = torch.cat([feature, torch.full_like(error_token, n_features)])
    value = torch.cat([value, value.new_zeros(len(error_token))])
    example, column = token // n_positions, token % n_positions
    key = example * (n_features + 1) + feature if joint else token * (n_features + 1) + feature
    rows, row = key.unique(return_inverse=True)

    effect = torch.zeros(len(rows), device=value.device)
    order = torch.argsort(row)
    bounds = torch.searchsorted(row[order], torch.arange(0, len(rows) + max_rows, max_rows, device=row.device)).tolist()
    for index, (low, high) in enumerate(pairwise(bounds)):
        entry = order[low:high]
        if len(entry) == 0:
            continue
        first = index * max_rows
        n_rows = min(max_rows, len(rows) - first)
        owner = torch.zeros(n_rows, dtype=torch.long, device=row.device)
        owner[row[entry] - first] = example[entry]
        change = torch.where(
            (feature[entry] == n_features)[:, None],
            error[token[entry]],
            value[entry, None] * sae.W_dec[feature[entry].clamp(max=n_features - 1)],
        )
        x = states.clean[site][owner].clone()
        x.index_put_((row[entry] - first, column[entry]), change.to(x.dtype), accumulate=True)
        effect[first : first + n_rows] = _metric_of_rows(model, states, metric, site=site, x=x, owner=owner)
    effect_example = torch.div(rows, n_features + 1, rounding_mode="floor")
    if joint:
        position = torch.full_like(effect_example, -1)
    else:
        position = effect_example % n_positions
        effect_example = effect_example // n_positions
        position = position - (n_positions - states.mask.sum(1))[effect_example]
    return SiteEffects(
        n_features,
        effect_example.int().cpu(),
        position.int().cpu(),
        (rows % (n_features + 1)).int().cpu(),
        effect.cpu(),
    )


def _metric_of_rows(
    model: LanguageModel, states: States, metric: Metric, *, site: Site, x: torch.Tensor, owner: torch.Tensor
) -> torch.Tensor:
    """m(row) - m(clean) for rows x [R, S, d] at `site`, row r belonging to example `owner[r]`. [R]"""
    cache = {before: known[owner] for before, known in states.clean.items() if before < site}
    skip = model.resume_from(site, cache) | {site: x}
    run = model.run(states.tokens[owner], skip=skip, last_only=True)
    return metric(run.logits[:, -1], states.prompts[owner]) - states.m_clean[owner]
