"""Which features are edited, and where: `resid_3/120` everywhere, `resid_3/120@subject` at a named span of the prompts
alone, `resid_3/120@5` at a token position, `resid_3/120@generated` at the tokens that are generated after the prompts.

x' = x + sum over spans of where * (edit(x) - x): what is edited at one span does not see what is at another. Spans
belong to the prompts: in generation they are the prompt's tokens, never later ones, and other text has none.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from circuits.prompts.dataset import PromptSet
from sae.autoencoder import SparseAutoencoder
from sae.data.batches import counted_tokens
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes

EVERYWHERE = ""
GENERATED = "generated"
"""Where only generated tokens are edited; prompts are not, so that what is measured on them stays as it is."""
Features = Mapping[Site, Tensor]
"""Chosen features: site -> their indices [n] int64."""


def parse_features(names: str | Sequence[str], saes: Mapping[Site, SparseAutoencoder]) -> dict[Site, Tensor]:
    """`"resid_3/120,mlp_2/7"` or a list of such names -> indices by site, in forward order, each once."""
    chosen: dict[Site, list[int]] = {}
    for name in names.split(",") if isinstance(names, str) else names:
        site, feature = _parse_feature(name.strip(), saes)
        chosen.setdefault(site, []).append(feature)
    if not chosen:
        raise UserError("no features to edit: name some, such as resid_3/120, or take the strongest of a circuit")
    return {site: torch.tensor(sorted(set(chosen[site]))) for site in saes if site in chosen}


def _parse_feature(name: str, saes: Mapping[Site, SparseAutoencoder]) -> tuple[Site, int]:
    site_name, slash, index = name.partition("/")
    by_name = {str(site): site for site in saes}
    if not slash:
        raise UserError(f"{name!r} is not a feature: write site/index, such as {next(iter(by_name), 'resid_3')}/120")
    site_name = site_name.replace(".", "_")
    if site_name not in by_name:
        raise unknown("site", site_name, by_name)
    site = by_name[site_name]
    if index in ("error", "skip"):
        what = "error" if index == "error" else "skip connection"
        raise UserError(f"{name!r} is the {what} of its site, not a feature: only features can be edited")
    n_features = as_saes(saes).config(site).n_features
    if not index.isdecimal() or int(index) >= n_features:
        hint = f"; did you mean '{site}/{n_features - 1}'?" if index.isdecimal() else ""
        raise UserError(f"unknown feature {name!r}: {site} has features 0 to {n_features - 1}{hint}")
    return site, int(index)


def counted_inputs(
    model: LanguageModel, tokens: Tokens, reads: Mapping[Site, Site], where: Tensor | None = None
) -> dict[Site, Tensor]:
    """The input of the dictionary of each site (`SAEs.read_sites`), [N, r] at the tokens (of `where` [B, S]) that are
    neither padding nor special.
    """
    counted = counted_tokens(model, tokens)  # [B, S]
    counted = counted if where is None else counted & where
    with torch.no_grad():
        run = model.run(tokens, capture=reads.values(), need_logits=False)
    return {site: run.activations[read][counted] for site, read in sorted(reads.items())}


def feature_names(features: Features) -> list[str]:
    """Indices by site -> `["mlp_2/7", "resid_3/120"]`."""
    return [f"{site}/{index}" for site, indices in features.items() for index in indices.tolist()]


def split_by_span(names: str | Sequence[str]) -> dict[str, list[str]]:
    """Feature names without their span, by span: `["a/1", "b/2@verb"]` -> {"": ["a/1"], "verb": ["b/2"]}."""
    by_span: dict[str, list[str]] = {}
    for name in names.split(",") if isinstance(names, str) else names:
        feature, at, span = name.strip().partition("@")
        if at and not span:
            raise UserError(f"{name!r} names no place after the @: write a span, such as {feature}@subject")
        by_span.setdefault(span, []).append(feature)
    return by_span


def needs_spans(names: str | Sequence[str]) -> bool:
    """Whether one of the names has a span of the prompts as its span."""
    return any(span not in (EVERYWHERE, GENERATED) and not span.isdecimal() for span in split_by_span(names))


def tokens_at(prompts: PromptSet, span: str) -> Tensor:
    """[B, S] bool: the tokens of a span; all real ones for the empty span and for `GENERATED`, which continues them."""
    real = prompts.clean.attention_mask.bool()
    if span in (EVERYWHERE, GENERATED):
        return real
    if span.isdecimal() and span not in prompts.spans:
        inside = (prompts.clean.position_ids == int(span)) & real
        if not inside.any(1).all():
            raise UserError(f"position {span} is behind the end of some prompts")
        return inside
    if prompts.span_numbers is None:
        raise UserError(f"there is no span {span!r}: these prompts have no spans")
    if span not in prompts.spans:
        raise unknown("span", span, prompts.spans)
    return prompts.span_numbers == prompts.spans.index(span)
