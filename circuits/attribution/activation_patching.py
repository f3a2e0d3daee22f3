"""Exact activation patching, which the other methods estimate: one forward pass a node.

Legend: B examples, S positions, d model width, F features; feature F is the error node, F + 1 the skip connection.

For every node that differs between the clean and the patch run:
1. put x + (f_patch - f_clean)_i W_dec[i] (for the error: x + e_patch - e_clean, for a skip connection the change of
   what it writes) in place of x at its site, in the clean run,
2. effect = m(that run) - m(clean).

`positions` says which tokens of an example are patched at once: all of them, which is what a node means in aggregation
`sum`, those of a span, or each by itself. Rows are batched and resume from the cached clean activations, so the cost is
one partial forward pass for every (example, [position,] feature) that is active in either run.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import SiteEffects, feature_deltas, skip_delta, token_chunks
from sae.autoencoder import SparseAutoencoder
from sae.model.sites import Site


def _reaching(states: ActivationPair, site: Site) -> Tensor:
    """[B, S] bool: real tokens, in the last block those that the metric reads, as far as the gradient is known."""
    return states.mask if states.gradients is None else states.live(site, states.gradients[site])


@torch.no_grad()
def _differing_nodes(sae: SparseAutoencoder, states: ActivationPair, site: Site) -> tuple[Tensor, Tensor, Tensor]:
    """(token, feature, f_patch - f_clean) of all features that differ, tokens numbered over [B * S]; padding left
    out.
    """
    of_site = states.of_site(site)
    clean, patch = of_site.read_clean.flatten(0, 1).float(), of_site.read_patch.flatten(0, 1).float()
    real = _reaching(states, site).flatten()
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in token_chunks(len(clean), sae.W_dec.shape[0]):
        delta = feature_deltas(sae, clean[chunk], patch[chunk], zero_patch=states.zero_patch)
        delta *= real[chunk, None]
        token, feature = delta.nonzero(as_tuple=True)
        columns.append((token + chunk.start, feature, delta[token, feature]))
    token, feature, value = (torch.cat(column) for column in zip(*columns, strict=True))
    return token, feature, value


def _other_deltas(
    sae: SparseAutoencoder, states: ActivationPair, site: Site, token: Tensor, feature: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """e_patch - e_clean = (x_patch - x_clean) - sum_i (f_patch - f_clean)_i W_dec[i] - (how the skip connection's part
    changes), and that change, two [B * S, d].
    """
    of_site, reached = states.of_site(site), _reaching(states, site).flatten()[:, None]
    delta = (of_site.patch - of_site.clean).flatten(0, 1).float() * reached
    read = of_site.read_clean.flatten(0, 1).float(), of_site.read_patch.flatten(0, 1).float()
    by_skip = skip_delta(sae, *read, zero_patch=states.zero_patch)
    skip = torch.zeros_like(delta) if by_skip is None else by_skip * reached
    delta -= skip
    for start in range(0, len(token), 2**16):  # [2**16, d] decoder rows at once
        part = slice(start, start + 2**16)
        delta.index_add_(0, token[part], value[part, None] * sae.W_dec[feature[part]], alpha=-1)
    return delta, skip


def _changes(
    sae: SparseAutoencoder, states: ActivationPair, site: Site, features: Tensor | None
) -> tuple[SiteEffects, Tensor]:
    """How every node changes at every token: f_patch - f_clean of the features, and of the error and the skip
    connection [2, B * S, d].

    The entries count positions over all S columns, padding included; those of error and skip have no value.
    `features`: of these nodes only.
    """
    n_features, n_positions = sae.W_dec.shape[0], states.mask.shape[1]
    token, feature, value = _differing_nodes(sae, states, site)
    others = torch.stack(_other_deltas(sae, states, site, token, feature, value))
    which, other_token = (others != 0).any(-1).nonzero(as_tuple=True)
    token = torch.cat([token, other_token])
    feature = torch.cat([feature, n_features + which])
    value = torch.cat([value, value.new_zeros(len(other_token))])
    if features is not None:
        is_wanted = torch.isin(feature, features.to(feature.device))
        token, feature, value = token[is_wanted], feature[is_wanted], value[is_wanted]
    return SiteEffects(n_features, token // n_positions, token % n_positions, feature, value), others


def _written(sae: SparseAutoencoder, changes: SiteEffects, others: Tensor, entry: Tensor, n_positions: int) -> Tensor:
    """The change of x by the entries, [n, d]; others: those of error and skip, [2, B * S, d]."""
    feature = changes.feature[entry]
    token = changes.example[entry] * n_positions + changes.position[entry]
    by_features = changes.value[entry, None] * sae.W_dec[feature.clamp(max=changes.n_features - 1)]
    which = (feature - changes.n_features).clamp(min=0)
    return torch.where((feature >= changes.n_features)[:, None], others[which, token], by_features)


@torch.no_grad()
def exact_effects(
    states: ActivationPair, *, site: Site, positions: Tensor | None, features: Tensor | None = None, max_rows: int = 512
) -> SiteEffects:
    """Exact effects of one site's nodes. `positions` [B, S] (see `positions_by`): tokens of equal number are patched
    at once, None for all; `features` ([n] int64, F for the error, F + 1 for the skip connection) restricts the work to
    some nodes.
    """
    sae = states.setting.saes[site]
    n_positions, n_nodes = states.mask.shape[1], sae.W_dec.shape[0] + 2
    changes, others = _changes(sae, states, site, features)
    example, column = changes.example, changes.position
    n_groups = 1 if positions is None else int(positions.max()) + 1
    group = 0 if positions is None else positions[example, column]
    rows, row = ((example * n_groups + group) * n_nodes + changes.feature).unique(return_inverse=True)
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
        x = x.index_put(index, _written(sae, changes, others, entry, n_positions).to(x.dtype), accumulate=True)
        effect[first : first + len(owner)] = states.metric_of_rows(site, x, owner) - states.m_clean[owner]
    where, feature = rows // n_nodes, rows % n_nodes
    example, position = where // n_groups, where % n_groups
    if positions is None:
        position = torch.full_like(example, -1)
    example, position, feature = (index.int().cpu() for index in (example, position, feature))
    return SiteEffects(changes.n_features, example, position, feature, effect.cpu())
