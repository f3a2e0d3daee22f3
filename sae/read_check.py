"""Whether a transcoder of another project reads where it was trained to, which its files may not say.

The explained variance at the write place, 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² over the tokens of a little text, is measured with
the transcoder reading where its config says, and printed. Where that is not above zero, or another place explains far
more, the same is measured at the block's other places. What explains nothing is refused, and the places are named.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import READ_KINDS, Site
from sae.model.tokens import Tokens
from sae.saes import as_saes

log = logging.getLogger(__name__)

SAMPLE = (
    "The old lighthouse keeper walked down to the harbour every morning, looked at the boats and wrote their names "
    "in a small blue book. In 1962 he had counted 417 of them.",
    "Water boils at a lower temperature on a mountain because the pressure of the air is lower there; this is why "
    "potatoes take longer to cook in La Paz than in Lima.",
    'She asked, "Where did you put the keys?" and he answered that they were on the table, next to the letter from his '
    "sister, which nobody had opened yet.",
)
"""Text to try a transcoder on where the caller has none."""
LEAST_KINDS = 30
"""Different tokens that the sample must have; of a tokenizer that knows none of its words the probe serves instead."""
CLEARLY = 0.05
"""Explained variance by which another place must be better to be told of."""
WAY_OUT = "sfc convert --format ours --read {0} writes one that reads there (in Python: load_saes(..., read={0!r}))"


@torch.no_grad()
def check_reads(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], tokens: Tokens | None = None
) -> dict[Site, float]:
    """Explained variance of every transcoder that another project made, by site, measured on `tokens`.

    Raises:
        UserError: a transcoder explains nothing of what the model writes at its site.
    """
    saes = as_saes(saes)
    foreign = [site for site in saes if saes.config(site).read and "format" in saes.config(site).extra]
    if not foreign:
        return {}
    batch = (_sample(model) if tokens is None else tokens).to(model.device)
    places = {site: _readable(model, saes, site) for site in foreign}
    run = model.run(batch, capture={*foreign, *(place for of_site in places.values() for place in of_site)})
    real = batch.attention_mask.bool()
    real &= real.cumsum(1) > 1  # the first token's activations are of another size in many models
    measured: dict[Site, float] = {}
    for site in foreign:
        x = run.activations[site][real]
        explained = {place.kind: _explained(saes[site], x, run.activations[place][real]) for place in places[site]}
        measured[site] = _judged(site, str(saes.config(site).read), explained)
    listed = ", ".join(f"{site} {value:.3g} (reads {saes.config(site).read})" for site, value in measured.items())
    log.warning("explained variance of transcoders made elsewhere: %s", listed)
    return measured


def _readable(model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], site: Site) -> list[Site]:
    """The places of the site's block that have the width which the transcoder reads."""
    width = as_saes(saes).config(site).read_width
    widths = model.reads.widths
    places = (Site(kind, site.layer) for kind in READ_KINDS)
    return [place for place in places if widths.get(place) == width]


def _judged(site: Site, read: str, explained: Mapping[str, float]) -> float:
    """The explained variance at the place that the config says; `UserError` where it is not above zero."""
    others = sorted((kind for kind in explained if kind != read), key=lambda kind: -explained[kind])
    tried = ", ".join(f"{explained[kind]:.3g} at {kind}" for kind in others)
    best = others[0] if others and explained[others[0]] > max(0.0, explained[read]) else ""
    if not explained[read] > 0:
        hint = f": {WAY_OUT.format(best)}" if best else ": it was made for another site, model or norm"
        raise UserError(
            f"the transcoder of site {str(site)!r} explains nothing of what the MLP writes (explained variance "
            f"{explained[read]:.3g} reading {read}; tried as well: {tried or 'no other place has its width'}){hint}"
        )
    if best and explained[best] > explained[read] + CLEARLY:
        log.warning(
            "site %s: its transcoder explains %.3g of the variance reading %s, and %.3g reading %s: %s",
            site, explained[read], read, explained[best], best, WAY_OUT.format(best),
        )  # fmt: skip
    return explained[read]


def _explained(sae: SparseAutoencoder, x: Tensor, x_read: Tensor) -> float:
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² of x [N, d] and what is read for it [N, r]."""
    x = x.float()
    error = (x - sae(x_read.float()).to(x)).square().sum()
    return float(1 - error / (x - x.mean(0)).square().sum())


def _sample(model: LanguageModel) -> Tokens:
    """A few sentences, or random tokens for a tokenizer that does not know their words."""
    try:
        tokens = model.tokenize(SAMPLE, max_length=model.max_positions)
    except UserError:  # no tokenizer
        return model.probe_tokens()
    return tokens if len(tokens.input_ids.unique()) >= LEAST_KINDS else model.probe_tokens()
