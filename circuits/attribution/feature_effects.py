"""From the gradient at a site to the effects of its features and its error, and to what edges need of them.

Legend: B examples, S positions, n tokens, d model width, F features; g = dm/dx [n, d].

Decoding is affine, x = f W_dec + b_dec + e, so with the gradient g of a site (at the clean run for attribution
patching, averaged along the path for integrated gradients; Marks et al. 2024, eq. 3 and 4), chunk of tokens by chunk:

1. encode the clean and the patch activations;
2. leave out the columns of features that are active at no token of the chunk;
3. effect of feature i = (f_patch - f_clean)_i * (W_dec[i] . g);
4. the effects of a token add up to (x_patch - x_clean) . g, so the error's effect is that minus those of the features;
5. where edges follow, from the same features: the error's change (x_patch - x_clean) - (f_patch - f_clean) W_dec, and
   its cotangent g - sum_active (W_dec[i] . g) W_enc[i]. They cost two matrix products more here, and save five there.

Tokens whose gradient is zero, or at which clean and patch do not differ, have no effects and are left out.

A transcoder is encoded from what it reads, x_read [n, r], and x = f W_dec + b_dec + W_skip x_read + e: a skip
connection is one more node, whose effect is (W_skip (x_read,patch - x_read,clean)) . g. There the cotangent of the
error has two parts, g at the site and -sum_active (W_dec[i] . g) W_enc[i] - W_skip^T g at the place that is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import SiteEffects, SiteStates, skip_delta, to_sparse, token_chunks, token_indices
from circuits.options import EdgeActive
from sae.autoencoder import SparseAutoencoder
from sae.model.sites import Site

SPARSE = 0.5
"""Columns are left out where at most this share of the features is active in a chunk."""


@dataclass(frozen=True)
class EdgeInputs:
    """Inputs of a site's edges that need its whole dictionary, and so are kept from the node pass.

    Features that compete (top k) cannot be encoded one by one: those active in the clean or the patch run are kept, m
    in all. Others are encoded again, as few as there are.
    """

    error_delta: Tensor
    """[B, S, d] e_patch - e_clean."""
    error_cotangent: Tensor
    """[B, S, d] g - sum_active (W_dec[i] . g) W_enc[i]; of a transcoder [B, S, r], without the g at the site."""
    token: Tensor | None = None
    """[m] int64, over B * S."""
    feature: Tensor | None = None
    """[m] int64."""
    f_clean: Tensor | None = None
    """[m]."""
    f_delta: Tensor | None = None
    """[m] f_patch - f_clean."""

    def to(self, device: torch.device | str) -> EdgeInputs:
        """The same on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in vars(self).items() if x is not None}
        return EdgeInputs(**moved)

    @property
    def has_acts(self) -> bool:
        """Whether features are kept."""
        return self.token is not None

    @property
    def n_bytes(self) -> int:
        """Memory they take."""
        return sum(x.numel() * x.element_size() for x in vars(self).values() if x is not None)

    def acts(self, feature: Tensor, *, n_features: int) -> tuple[Tensor, Tensor] | None:
        """f_clean and f_patch - f_clean of the features [k], two [B, S, k]; None where they are not kept."""
        if self.token is None or self.feature is None or self.f_clean is None or self.f_delta is None:
            return None
        # Only entries of the chosen features are put into dense columns; `column` is -1 for all other features.
        chosen, chosen_column = feature.unique(return_inverse=True)
        numbers = torch.arange(len(chosen), device=feature.device)
        column = torch.full((n_features,), -1, device=feature.device).index_copy(0, chosen, numbers)[self.feature]
        is_chosen = column >= 0
        index = (self.token[is_chosen], column[is_chosen])
        shape = self.error_delta.shape[:2]
        clean, delta = (
            x.new_zeros(shape.numel(), len(chosen)).index_put(index, x[is_chosen])[:, chosen_column].unflatten(0, shape)
            for x in (self.f_clean, self.f_delta)
        )
        return clean, delta


class _Chunk(NamedTuple):
    """Results for n tokens of a site."""

    effects: SiteEffects | None
    error_delta: Tensor | None  # [n, d]
    error_cotangent: Tensor | None  # [n, d]; of a transcoder [n, r]
    acts: tuple[Tensor, Tensor, Tensor, Tensor] | None  # token (of the n), feature, f_clean, f_patch - f_clean; [m]


def _contract_chunk(
    sae: SparseAutoencoder,
    x: tuple[Tensor, Tensor, Tensor, Tensor],
    g: Tensor,
    tokens: tuple[Tensor, Tensor],
    *,
    zero_patch: bool,
    active: EdgeActive | None,
    effects: bool,
) -> _Chunk:
    """Steps 1 to 5 for n tokens (x: clean and patch, [n, d], and what is read in both, [n, r]; g: [n, d]); without
    `active` step 5 is left out, without `effects` 3 and 4.

    The three [n, F] tensors are reused for the next result as soon as they are read for the last time, since they are
    the largest here: f_patch becomes the difference, then the effects; the pull becomes the active pull.
    """
    clean, patch, read_clean, read_patch = x
    f_clean = sae.encode(read_clean)
    f_patch = torch.zeros_like(f_clean) if zero_patch else sae.encode(read_patch)
    awake = torch.logical_or(f_clean, f_patch)
    decoder, columns = sae.W_dec, awake.any(0).nonzero()[:, 0]
    narrow = len(columns) <= SPARSE * len(decoder)
    if narrow:
        f_clean, f_patch, awake, decoder = f_clean[:, columns], f_patch[:, columns], awake[:, columns], decoder[columns]
    dx, pull = patch - clean, g @ decoder.T
    delta = f_patch.sub_(f_clean)
    by_skip = skip_delta(sae, read_clean, read_patch, zero_patch=zero_patch)  # [n, d]
    acts = error_delta = error_cotangent = sparse = None
    if active and sae.nonlinearity.needs_k:
        token, column = awake.nonzero(as_tuple=True)
        acts = token, columns[column] if narrow else column, f_clean[token, column], delta[token, column]
    if active:
        error_delta = torch.addmm(dx if by_skip is None else dx - by_skip, delta, decoder, alpha=-1)
    if effects:
        value = delta.mul_(pull)  # from here on `delta` is gone
        skip = None if by_skip is None else (by_skip * g).sum(-1)
        error = (dx * g).sum(-1) - value.sum(-1) - (0.0 if skip is None else skip)
        sparse = to_sparse(sae, tokens, value, error, columns=columns if narrow else None, skip=skip)
    if active:
        encoder = sae.encoder_rows(columns if narrow else torch.arange(len(decoder), device=g.device))
        is_active = awake if active == "either" else f_clean != 0
        error_cotangent = torch.addmm(at_read(sae, g), pull.mul_(is_active), encoder, alpha=-1)
    return _Chunk(sparse, error_delta, error_cotangent, acts)


def at_read(sae: SparseAutoencoder, g: Tensor) -> Tensor:
    """The part of the error's cotangent that no feature has, at the place that is read: g [..., d] itself for an
    autoencoder, -W_skip^T g [..., r] for a transcoder.
    """
    if not sae.config.read:
        return g
    return -sae.skip_gradient(g) if sae.has_skip else g.new_zeros(*g.shape[:-1], sae.config.read_width)


@torch.no_grad()
def _contract(
    sae: SparseAutoencoder,
    of_site: SiteStates,
    gradient: Tensor,
    live: Tensor,
    mask: Tensor,
    *,
    active: EdgeActive | None = None,
    effects: bool = True,
) -> Iterator[_Chunk]:
    """The tokens `live` [B, S], chunk by chunk."""
    clean, patch, read_clean, read_patch = (x.to(sae.W_dec)[live] for x in of_site.tensors)
    g, (example, position) = gradient[live].to(sae.W_dec), token_indices(live, mask)
    for chunk in token_chunks(len(clean), sae.W_dec.shape[0]):
        x = clean[chunk], patch[chunk], read_clean[chunk], read_patch[chunk]
        tokens = example[chunk], position[chunk]
        result = _contract_chunk(
            sae, x, g[chunk], tokens, zero_patch=of_site.zero_patch, active=active, effects=effects
        )
        if result.acts is not None:  # tokens of the chunk -> of all that are live
            result = result._replace(acts=(result.acts[0] + chunk.start, *result.acts[1:]))
        yield result


def _effects(sae: SparseAutoencoder, chunks: list[_Chunk]) -> SiteEffects:
    return SiteEffects.concatenate((chunk.effects for chunk in chunks if chunk.effects), sae.W_dec.shape[0])


def contract_gradient(
    sae: SparseAutoencoder,
    x_clean: Tensor,
    x_patch: Tensor,
    gradient: Tensor,
    *,
    mask: Tensor,
    zero_patch: bool = False,
) -> SiteEffects:
    """Effects of all features and the error of one site with an autoencoder.

    Args:
        sae: the autoencoder of the site.
        x_clean, x_patch, gradient: [B, S, d].
        mask: [B, S] bool, True at real tokens (left-padded).
        zero_patch: whether the patch features are 0, whatever the encoder says.

    Returns:
        Sparse effects on the CPU without zeros; positions count from each prompt's first real token.
    """
    return _site_effects(sae, SiteStates(x_clean, x_patch, x_clean, x_patch, zero_patch), gradient, mask)


def _site_effects(sae: SparseAutoencoder, of_site: SiteStates, gradient: Tensor, mask: Tensor) -> SiteEffects:
    live = mask & of_site.differ & (gradient != 0).any(-1)
    return _effects(sae, list(_contract(sae, of_site, gradient, live, mask)))


def contract(
    states: ActivationPair, gradient: Tensor, *, site: Site, active: EdgeActive | None = None
) -> tuple[SiteEffects, EdgeInputs | None]:
    """Effects at a site from the gradient [B, S, d] there, and with `active` (where a downstream feature counts as
    active) the inputs of edges, which neurons do not need.
    """
    sae, of_site, mask = states.setting.saes[site], states.of_site(site), states.mask
    if not active or sae.config.architecture == "identity":  # neurons have no errors
        return _site_effects(sae, of_site, gradient, mask), None
    live = states.live(site, gradient)
    chunks = list(_contract(sae, of_site, gradient, live, mask, active=active))
    return _effects(sae, chunks), _edge_inputs(sae, chunks, live)


def edge_inputs(states: ActivationPair, gradient: Tensor, *, site: Site, active: EdgeActive) -> EdgeInputs | None:
    """The inputs of edges at a site, without the effects; None for neurons."""
    sae = states.setting.saes[site]
    if sae.config.architecture == "identity":
        return None
    gradient = gradient.to(states.mask.device)  # stored ones are on the CPU
    live = states.live(site, gradient)
    chunks = _contract(sae, states.of_site(site), gradient, live, states.mask, active=active, effects=False)
    return _edge_inputs(sae, list(chunks), live)


def _edge_inputs(sae: SparseAutoencoder, chunks: list[_Chunk], live: Tensor) -> EdgeInputs:
    """The chunks of the tokens `live` [B, S] as one, tokens that are not live with zeros."""
    token_of_live = live.flatten().nonzero()[:, 0].to(sae.device)  # [n] over B * S
    dense = []
    for name, width in (("error_delta", sae.config.d_model), ("error_cotangent", sae.config.read_width)):
        x = sae.W_dec.new_zeros(live.numel(), width)
        x[token_of_live] = torch.cat([x[:0], *(getattr(chunk, name) for chunk in chunks)])
        dense.append(x.unflatten(0, live.shape))
    if not chunks or chunks[0].acts is None:
        return EdgeInputs(dense[0], dense[1])
    columns = zip(*(chunk.acts for chunk in chunks if chunk.acts is not None), strict=True)
    token, *acts = (torch.cat(column) for column in columns)
    return EdgeInputs(dense[0], dense[1], token_of_live[token], *acts)
