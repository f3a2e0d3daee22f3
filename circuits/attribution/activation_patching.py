"""Exact activation patching: what the estimates estimate, one forward pass a node.

Legend: B examples, S positions, d model width, F features; feature F is the error node.

For every node that differs between the clean and the patch run:
1. put x + (f_patch - f_clean)_i W_dec[i] (for the error: x + e_patch - e_clean) in place of x at its site, in the
   clean run,
2. effect = m(that run) - m(clean).

`positions` says which tokens of an example are patched at once: all of them, which is what a node means in aggregation
`sum`, those of a span, or each by itself. Rows are batched and resume from the cached clean activations, so the cost is
one partial forward pass for every (example, [position,] feature) that is active in either run.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import SiteEffects, feature_deltas, token_chunks
from circuits.metrics.metrics import Metric
from sae.autoencoder import SparseAutoencoder
from sae.model.language_model import LanguageModel
from sae.model.sites import Site


def _reaching(states: ActivationPair, site: Site) -> Tensor:
    """[B, S] bool: real tokens, in the last block those that the metric reads, as far as the gradient is known."""
    return states.mask if states.gradients is None else states.live(site, states.gradients[site])


@torch.no_grad()
def _differing_nodes(sae: SparseAutoencoder, states: ActivationPair, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """(token, feature, f_patch - f_clean) of all features that differ, tokens numbered over [B * S]; padding left
    out.
    """
    clean, patch = states.clean[site].flatten(0, 1).float(), states.patch[site].flatten(0, 1).float()
    real = _reaching(states, site).flatten()
    tokens, features, values = [], [], []
    for chunk in token_chunks(len(clean), sae.W_dec.shape[0]):
        delta = feature_deltas(sae, clean[chunk], patch[chunk], zero_patch=states.zero_patch)
        delta *= real[chunk, None]
        token, feature = delta.nonzero(as_tuple=True)
        tokens.append(token + chunk.start)
        features.append(feature)
        values.append(delta[token, feature])
    return torch.cat(tokens), torch.cat(features), torch.cat(values)


def _error_delta(sae: SparseAutoencoder, states: ActivationPair, site: Site, token, feature, value) -> Tensor:
    """e_patch - e_clean = (x_patch - x_clean) - sum_i (f_patch - f_clean)_i W_dec[i], [B * S, d]."""
    delta = (states.patch[site] - states.clean[site]).flatten(0, 1).float() * _reaching(states, site).flatten()[:, None]
    for start in range(0, len(token), 2**16):
        part = slice(start, start + 2**16)
        delta.index_add_(0, token[part], value[part, None] * sae.W_dec[feature[part]], alpha=-1)
    return delta


@dataclass(frozen=True)
class _Entries:
    """What changes where: entry n adds `value[n] W_dec[feature[n]]`, or the error's change, at `token[n]`."""

    token: Tensor  # [n] over B * S
    feature: Tensor  # [n], F for the error
    value: Tensor  # [n]
    error: Tensor  # [B * S, d] e_patch - e_clean

    @staticmethod
    def of(sae: SparseAutoencoder, states: ActivationPair, site: Site, features: Tensor | None) -> _Entries:
        """All nodes of a site that differ between the runs, or those of `features` only."""
        n_features = sae.W_dec.shape[0]
        token, feature, value = _differing_nodes(sae, states, site)
        error = _error_delta(sae, states, site, token, feature, value)
        error_token = (error != 0).any(-1).nonzero()[:, 0]
        token = torch.cat([token, error_token])
        feature = torch.cat([feature, torch.full_like(error_token, n_features)])
        value = torch.cat([value, value.new_zeros(len(error_token))])
        if features is not None:
            kept = torch.isin(feature, features.to(feature.device))
            token, feature, value = token[kept], feature[kept], value[kept]
        return _Entries(token, feature, value, error)

    def change(self, sae: SparseAutoencoder, entry: Tensor) -> Tensor:
        """What the entries add to x, [n, d]."""
        n_features = sae.W_dec.shape[0]
        written = self.value[entry, None] * sae.W_dec[self.feature[entry].clamp(max=n_features - 1)]
        return torch.where((self.feature[entry] == n_features)[:, None], self.error[self.token[entry]], written)


@torch.no_grad()
def exact_effects(
    model: LanguageModel,
    sae: SparseAutoencoder,
    states: ActivationPair,
    metric: Metric,
    *,
    site: Site,
    positions: Tensor | None,
    features: Tensor | None = None,
    max_rows: int = 512,
) -> SiteEffects:
    """Exact effects of one site's nodes. `positions` [B, S] (see `positions_by`): tokens of equal number are
    patched at once, None for all; `features` ([n] int64, F for the error) restricts the work to some nodes.
    """
    n_positions, n_nodes = states.mask.shape[1], sae.W_dec.shape[0] + 1
    entries = _Entries.of(sae, states, site, features)
    example, column = entries.token // n_positions, entries.token % n_positions
    n_groups = 1 if positions is None else int(positions.max()) + 1
    group = 0 if positions is None else positions[example, column]
    rows, row = ((example * n_groups + group) * n_nodes + entries.feature).unique(return_inverse=True)
    effect = torch.zeros(len(rows), device=rows.device)
    order = torch.argsort(row)
    starts = torch.arange(0, len(rows) + max_rows, max_rows, device=row.device)
    bounds = torch.searchsorted(row[order], starts).tolist()
    for first, (low, high) in zip(starts.tolist(), pairwise(bounds), strict=False):
        entry = order[low:high]
        if len(entry) == 0:
            continue
        owner = example.new_zeros(min(max_rows, len(rows) - first))
        owner[row[entry] - first] = example[entry]
        x = states.clean[site][owner]
        index = (row[entry] - first, column[entry])
        x = x.index_put(index, entries.change(sae, entry).to(x.dtype), accumulate=True)
        effect[first : first + len(owner)] = _metric_of_rows(model, states, metric, site=site, x=x, owner=owner)
    where, feature = rows // n_nodes, rows % n_nodes
    example, position = where // n_groups, where % n_groups
    if positions is None:
        position = torch.full_like(example, -1)
    example, position, feature = (index.int().cpu() for index in (example, position, feature))
    return SiteEffects(n_nodes - 1, example, position, feature, effect.cpu())


def _metric_of_rows(
    model: LanguageModel, states: ActivationPair, metric: Metric, *, site: Site, x: Tensor, owner: Tensor
) -> Tensor:
    """m(row) - m(clean) for rows x [R, S, d] at `site`, row r belonging to example `owner[r]`. [R]"""
    run = model.run(states.tokens[owner], skip=states.resume(model, site, owner) | {site: x}, last_only=True)
    return metric(run.logits[:, -1], states.prompts[owner]) - states.m_clean[owner]
