"""From the gradient at a site to the effects of its features and its error, and to what edges need of them.

Legend: B examples, S positions, n tokens, d model width, F features; g = dm/dx [n, d].

Decoding is affine, x = f W_dec + b_dec + e, so with the gradient g of a site (at the clean run for attribution
patching, averaged along the path for integrated gradients; Marks et al. 2024, eq. 3 and 4), chunk of tokens by chunk:

1. encode the clean and the patch activations;
2. leave out the columns of features that are active at no token of the chunk;
3. effect of feature i = (f_patch - f_clean)_i * (W_dec[i] . g);
4. the effects of a token add up to (x_patch - x_clean) . g, so the error's effect is that minus those of the features;
5. where edges follow, from the same codes: the error's change (x_patch - x_clean) - (f_patch - f_clean) W_dec, and its
   cotangent g - sum_active (W_dec[i] . g) W_enc[i]. They are two matrix products more here, and five less there.

Tokens whose gradient is zero, or at which clean and patch do not differ, have no effects and are left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from circuits.attribution.activations import ActivationPair
from circuits.attribution.effects import SiteEffects, sparse_entries, token_chunks
from sae.autoencoder import SparseAutoencoder
from sae.model.sites import Site

SPARSE = 0.5
"""Columns are left out where at most this share of the features is active in a chunk."""


class PairActs(NamedTuple):
    """Features of N tokens, those active in the clean or the patch run."""

    token: Tensor  # [n] int64, over B * S
    feature: Tensor  # [n] int64
    clean: Tensor  # [n] f_clean
    delta: Tensor  # [n] f_patch - f_clean

    def of(self, feature: Tensor, *, n_features: int, n_tokens: int) -> tuple[Tensor, Tensor]:
        """f_clean and f_patch - f_clean of the features [k], dense: two [N, k]."""
        wanted, place = feature.unique(return_inverse=True)
        column = torch.full((n_features,), -1, device=feature.device).index_copy(
            0, wanted, torch.arange(len(wanted), device=feature.device)
        )[self.feature]
        here = column >= 0
        at = (self.token[here], column[here])
        clean, delta = (x.new_zeros(n_tokens, len(wanted)).index_put(at, x[here]) for x in (self.clean, self.delta))
        return clean[:, place], delta[:, place]


@dataclass(frozen=True)
class EdgeInputs:
    """What the edges of a site need that takes the whole dictionary to compute."""

    error_delta: Tensor
    """[B, S, d] e_patch - e_clean."""
    error_cotangent: Tensor
    """[B, S, d] g - sum_active (W_dec[i] . g) W_enc[i]."""
    codes: PairActs | None
    """The features themselves where they compete (top k); elsewhere a few of them are soon encoded again."""

    def to(self, device: torch.device | str) -> EdgeInputs:
        """The same on another device."""
        codes = None if self.codes is None else PairActs(*(x.to(device) for x in self.codes))
        return EdgeInputs(self.error_delta.to(device), self.error_cotangent.to(device), codes)

    @property
    def n_bytes(self) -> int:
        tensors = [self.error_delta, self.error_cotangent, *(self.codes or ())]
        return sum(x.numel() * x.element_size() for x in tensors)


class _Part(NamedTuple):
    """Of one chunk of tokens."""

    token: Tensor
    feature: Tensor
    value: Tensor
    error: Tensor  # [n]
    error_delta: Tensor | None
    error_cotangent: Tensor | None
    codes: PairActs | None


def _contract_chunk(
    sae: SparseAutoencoder, clean, patch, g, *, zero_patch: bool, ends: str | None, effects: bool
) -> _Part:
    """Steps 1 to 5 for n tokens, all [n, d]; `ends`: where features are active for the error's cotangent; without
    `effects` there are no entries.
    """
    f_clean = sae.encode(clean)
    f_patch = torch.zeros_like(f_clean) if zero_patch else sae.encode(patch)
    awake = torch.logical_or(f_clean, f_patch)
    column = awake.any(0).nonzero()[:, 0]
    decoder = sae.W_dec
    narrow = len(column) <= SPARSE * len(decoder)
    if narrow:
        f_clean, f_patch, awake, decoder = f_clean[:, column], f_patch[:, column], awake[:, column], decoder[column]
    dx, pull = patch - clean, g @ decoder.T
    active = awake if ends == "either" else f_clean != 0
    delta = f_patch.sub_(f_clean)
    codes = _codes(awake, f_clean, delta, column if narrow else None) if ends and sae.nonlinearity.needs_k else None
    error_delta = torch.addmm(dx, delta, decoder, alpha=-1) if ends else None
    product = delta.mul_(pull) if effects else delta[:0]
    token, feature = product.nonzero(as_tuple=True)
    value, error = product[token, feature], (dx * g).sum(-1)[: len(product)] - product.sum(-1)
    cotangent = None
    if ends:
        encoder = sae.encoder_rows(column) if narrow else sae.encoder_rows(torch.arange(len(decoder), device=g.device))
        cotangent = torch.addmm(g, pull.mul_(active), encoder, alpha=-1)
    return _Part(token, column[feature] if narrow else feature, value, error, error_delta, cotangent, codes)


def _codes(awake: Tensor, f_clean: Tensor, delta: Tensor, column: Tensor | None) -> PairActs:
    token, place = awake.nonzero(as_tuple=True)
    feature = place if column is None else column[place]
    return PairActs(token, feature, f_clean[token, place], delta[token, place])


@torch.no_grad()
def _contract(sae: SparseAutoencoder, x_clean, x_patch, gradient, at, *, effects: bool = True, **options):
    """Parts of the tokens `at` [B, S], in chunks, with the index of their first token."""
    clean, patch, g = (x[at].to(sae.W_dec) for x in (x_clean, x_patch, gradient))
    for chunk in token_chunks(len(clean), sae.W_dec.shape[0]):
        yield chunk.start, _contract_chunk(sae, clean[chunk], patch[chunk], g[chunk], effects=effects, **options)


def _effects(sae: SparseAutoencoder, parts: Iterable[tuple[int, _Part]], at, mask) -> SiteEffects:
    """Entries of the parts, whose tokens are numbered over `at` [B, S]."""
    entries = [(start, part.token, part.feature, part.value, part.error) for start, part in parts]
    return sparse_entries(sae, entries, at, mask)


def contract_gradient(
    sae: SparseAutoencoder,
    x_clean: Tensor,
    x_patch: Tensor,
    gradient: Tensor,
    *,
    mask: Tensor,
    zero_patch: bool = False,
) -> SiteEffects:
    """Effects of all features and the error of one site.

    x_clean, x_patch, gradient: [B, S, d]; mask: [B, S] bool, True at real tokens (left-padded). Returns sparse
    effects on the CPU whose zero entries are left out; positions count from each prompt's first real token.
    """
    at = mask & (x_clean != x_patch).any(-1) & (gradient != 0).any(-1)
    parts = _contract(sae, x_clean, x_patch, gradient, at, zero_patch=zero_patch, ends=None)
    return _effects(sae, parts, at, mask)


def contract(
    sae: SparseAutoencoder, states: ActivationPair, gradient: Tensor, *, site: Site, ends: str | None = None
) -> tuple[SiteEffects, EdgeInputs | None]:
    """Effects at a site from the gradient [B, S, d] there, and with `ends` (`clean` or `either`: where a downstream
    feature is active) what edges need.
    """
    clean, patch, mask = states.clean[site], states.patch[site], states.mask
    if not ends or sae.config.architecture == "identity":  # neurons have no errors
        return contract_gradient(sae, clean, patch, gradient, mask=mask, zero_patch=states.zero_patch), None
    at = states.live(site, gradient)
    parts = list(_contract(sae, clean, patch, gradient, at, zero_patch=states.zero_patch, ends=ends))
    return _effects(sae, parts, at, mask), _site_ends(sae, parts, at)


def site_ends(
    sae: SparseAutoencoder, states: ActivationPair, gradient: Tensor, *, site: Site, ends: str
) -> EdgeInputs | None:
    """What edges need of a site, without the effects; None for neurons."""
    if sae.config.architecture == "identity":
        return None
    clean, patch, at = states.clean[site], states.patch[site], states.live(site, gradient)
    options = {"zero_patch": states.zero_patch, "ends": ends, "effects": False}
    return _site_ends(sae, list(_contract(sae, clean, patch, gradient, at, **options)), at)


def _site_ends(sae: SparseAutoencoder, parts: list[tuple[int, _Part]], at: Tensor) -> EdgeInputs:
    place = at.flatten().nonzero()[:, 0].to(sae.device)  # [n] over B * S
    codes = [PairActs(part.codes.token + start, *part.codes[1:]) for start, part in parts if part.codes is not None]
    whole = PairActs(*(torch.cat(column) for column in zip(*codes, strict=True))) if codes else None
    dense = []
    for name in ("error_delta", "error_cotangent"):
        x = sae.W_dec.new_zeros(at.numel(), sae.W_dec.shape[1])
        x[place] = torch.cat([x[:0], *(getattr(part, name) for _, part in parts)])
        dense.append(x.unflatten(0, at.shape))
    return EdgeInputs(dense[0], dense[1], whole and whole._replace(token=place[whole.token]))
