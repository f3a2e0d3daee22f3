"""Putting autoencoders and transcoders into a running model, and the check that they belong there.

At a site x = x̂ + e, with x̂ what the dictionary makes of what it reads (x itself, or for a transcoder what is at a place
before the site) and e its error. Two edits for `LanguageModel.run`, by `edits_of`:

1. `replace_with_reconstruction`: x becomes x̂, the error is lost.
2. `identity_splice`: x becomes x̂ + e, which must leave the logits as they are.

`check_saes` tries the second at every site whenever autoencoders are attached to a model, so that a dictionary made for
another model, width or site fails there, with a sentence that names the site. What only looks wrong is warned of: files
that name another model, and an x̂ that is further from x than zero is.

`check_reads` holds transcoders of other projects, whose files may not say where they read, against the model: the
explained variance 1 − Σ‖x − x̂‖² / Σ‖x − x̄‖² at the write place, over the tokens of a little text, with the transcoder
reading where its config says, is printed. Where that is not above zero, or another place of the block explains far
more, the others are named; what explains nothing is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor

from sae.autoencoder import SITE_PATH, SAEConfig, SparseAutoencoder, SparseFeatures
from sae.data.batches import bounded, counted_predictions, counted_tokens, token_batches
from sae.data.predictions import ModelPredictions, PredictionTotals
from sae.errors import UserError, unknown
from sae.formats.site_names import EMBED_HOOKS
from sae.model.device_map import weight_of
from sae.model.forward import is_exact, relative_difference
from sae.model.hook_points import SiteEdit, with_read
from sae.model.language_model import LanguageModel
from sae.model.sites import READ_KINDS, Site
from sae.model.tokens import Tokens
from sae.saes import SAEs, as_saes
from sae.sparse.activations import group_offsets, weighted_segment_sum

log = logging.getLogger(__name__)

TOLERANCE = 1e-5  # of the largest logit, in float32 and float64
TOLERANCE_16_BIT = 1e-2
EMBEDDING_TOLERANCE = 1e-2
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


def decode_sparse(sae: SparseAutoencoder, features: SparseFeatures, n_tokens: int) -> Tensor:
    """x̂ [N, d] from nonzero features sorted by token: the same as `sae.decode` without the [N, F] in between."""
    offsets = group_offsets(features.token, n_tokens)  # [N + 1] where each token's features begin
    return sae.b_dec + weighted_segment_sum(sae.W_dec, features.feature, offsets, features.value.to(sae.W_dec.dtype))


def reconstruct(sae: SparseAutoencoder, x_read: Tensor) -> Tensor:
    """Reconstruct what is read, [N, r] -> x̂ [N, d] in its precision, without an [N, F] in between."""
    x_hat = decode_sparse(sae, sae.encode_sparse(x_read), len(x_read))
    return sae.with_skip(x_hat, x_read).to(x_read.dtype)


ReadingEdit = Callable[..., Tensor]
"""(x [B, S, d], what the site's dictionary reads [B, S, r]) -> what stands in place of x; of x alone if it reads x."""


def replace_with_reconstruction(sae: SparseAutoencoder, where: Tensor | None = None) -> ReadingEdit:
    """The edit x [B, S, d] -> x̂, at the tokens `where` [B, S] alone if given."""

    def edit(x: Tensor, x_read: Tensor | None = None) -> Tensor:
        read = x if x_read is None else x_read
        return sae(read) if where is None else x.masked_scatter(where[..., None], reconstruct(sae, read[where]))

    return edit


def identity_splice(sae: SparseAutoencoder) -> ReadingEdit:
    """The edit x -> x̂ + (x − x̂)."""

    def edit(x: Tensor, x_read: Tensor | None = None) -> Tensor:
        reconstruction = sae(x if x_read is None else x_read)
        return reconstruction + (x.to(reconstruction.dtype) - reconstruction)

    return edit


def edits_of(saes: Mapping[Site, SparseAutoencoder], edits: Mapping[Site, ReadingEdit]) -> dict[Site, SiteEdit]:
    """Edits for `LanguageModel.run` at the sites of `edits`, each with what the site's dictionary reads in that run."""
    reads = as_saes(saes).read_sites(edits)
    return {where: e for site, edit in edits.items() for where, e in with_read(site, reads[site], edit).items()}


def check_saes(model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], tokens: Tokens | None = None) -> None:
    """Raise UserError where an autoencoder does not fit the model; the sentence names the site.

    Tried on `tokens`, or on a few random ones. A reconstruction that is further from x than zero is logged as a
    warning: such an autoencoder was probably made for another site. So are files that name another model.
    """
    saes = as_saes(saes)
    if not saes:
        raise UserError("no autoencoders given: at least one site is needed")
    _check_configs(model, saes)
    batch = model.probe_tokens() if tokens is None else tokens
    reads = saes.read_sites(saes)
    plain = model.run(batch, capture={*saes, *reads.values()})
    real = batch.attention_mask.to(model.device).bool()
    for site in saes:
        if saes.config(site).extra.get("hook") in EMBED_HOOKS:
            _check_embedding(model, plain.activations[site][real], batch.input_ids.to(model.device)[real])
    looked_at: set[Site] = set()

    def spliced(site: Site) -> ReadingEdit:
        def edit(x: Tensor, x_read: Tensor) -> Tensor:
            sae = saes[site]  # asked for when the forward pass is there: streamed ones take turns
            if site not in looked_at:
                looked_at.add(site)
                _warn_if_useless(site, sae, plain.activations[site][real], plain.activations[reads[site]][real])
            return identity_splice(sae)(x, x_read)

        return edit

    def difference(sites: Iterable[Site]) -> float:
        edits = edits_of(saes, {site: spliced(site) for site in sites})
        return relative_difference(model.run(batch, edits=edits).logits, plain.logits)

    allowed = TOLERANCE if is_exact(model.dtype) else TOLERANCE_16_BIT
    if not difference(saes) <= allowed:
        _blame(saes, lambda site: difference([site]), allowed)
    check_reads(model, saes, tokens)
    if not saes.is_lazy:
        _checked.setdefault(model, WeakSet()).update(saes.values())


def _blame(saes: SAEs, difference: Callable[[Site], float], allowed: float) -> None:
    """UserError for the first autoencoder that changes the logits by more than is allowed, if one alone does."""
    for site in saes:
        if broken := [name for name, x in saes[site].named_buffers() if not x.isfinite().all()]:
            raise UserError(
                f"the autoencoder of site {str(site)!r} holds numbers that are not finite in {', '.join(broken)}: take "
                "another, or train it again"
            )
        change = difference(site)
        if not change <= allowed:
            raise UserError(
                f"the autoencoder of site {str(site)!r} does not belong there: putting x̂ + (x − x̂) in place of x "
                f"changes the logits by {change:.1e} of their size, allowed is {allowed:.0e}"
            )


def ensure_checked(
    model: LanguageModel, saes: Mapping[Site, SparseAutoencoder], sites: Iterable[Site] | None = None
) -> None:
    """`check_saes` for those of some sites, by default of all and at least one, that have not been checked with this
    model before.

    Of streamed autoencoders no more than the configs are looked at: each would be read from disk once more.
    """
    some = as_saes(saes) if sites is None else as_saes(saes).subset(sites)
    if some.is_lazy:
        _check_configs(model, some)
    elif (sites is None and not some) or not set(some.values()) <= set(_checked.get(model, ())):
        check_saes(model, some)


_checked: WeakKeyDictionary[LanguageModel, WeakSet[SparseAutoencoder]] = WeakKeyDictionary()
"""Autoencoders that were found to fit, by model."""


def _check_configs(model: LanguageModel, saes: SAEs) -> None:
    configs = {site: saes.config(site) for site in saes}
    for site, config in configs.items():
        _check_made_for(model, site, config)
    named = {config.model: site for site, config in configs.items() if config.model and not config.model_fingerprint}
    for name, site in named.items():
        made_for, this_model = (_short(path) for path in (name, model.name))
        if not (made_for.startswith(this_model) or this_model.startswith(made_for)):
            log.warning(
                "site %s: the files of its autoencoder name the model %s, this one is %s: features of another model "
                "mean nothing here", site, name, model.name,
            )  # fmt: skip


def _short(model: str) -> str:
    """The name of a model without owner, folders and size words that packages write differently."""
    return model.rstrip("/").rpartition("/")[2].lower().removesuffix("-small")


def _check_embedding(model: LanguageModel, x: Tensor, ids: Tensor) -> None:
    """TransformerLens' `hook_embed` is the token embedding alone, up to a factor. x: [N, d]; ids: [N]."""
    if model.server:  # its embeddings are not here
        return
    weight = weight_of(model.hf.get_input_embeddings())
    assert weight is not None
    rows, x = weight.detach()[ids].to(x.device).float(), x.float()
    if rows.shape == x.shape:
        factor = (x * rows).sum() / rows.square().sum()
        if (x - factor * rows).norm() > EMBEDDING_TOLERANCE * x.norm():
            raise UserError(
                "the autoencoder of site 'embed' was made for hook_embed, the embeddings of tokens alone, and what the "
                "first block of this model reads holds their positions as well: take one of blocks.0.hook_resid_pre"
            )


def _check_made_for(model: LanguageModel, site: Site, config: SAEConfig) -> None:
    if site not in model.widths:
        raise unknown("site", str(site), [other.name for other in model.sites])
    if config.model_fingerprint and not model.is_model(config.model_fingerprint):
        raise UserError(
            f"the autoencoder of site {str(site)!r} was made for another model: its model is {config.model!r} "
            f"({config.model_fingerprint}), this one is {model.name!r} ({model.fingerprint})"
        )
    if config.site and Site.parse(config.site) != site:
        raise UserError(f"the autoencoder given for site {str(site)!r} was made for site {config.site!r}")
    made_at, read_at = config.extra.get(SITE_PATH), model.moved_sites.get(site, "")
    if made_at is not None and not model.reads_at(site, made_at):
        raise UserError(
            f"the autoencoder of site {str(site)!r} reads {made_at or 'where the architecture has that site'}, which "
            f"this model was loaded with at {read_at or 'its usual place'}: "
            + (f"give site paths with {site}={made_at}" if made_at else "leave its site path out")
        )
    if config.read and config.read_width != (width := model.read_width(config.read_site(site))):
        raise UserError(
            f"the transcoder of site {str(site)!r} reads width {config.read_width} at {config.read}: allowed is "
            f"{width}, the width of the model there"
        )
    if config.d_model != model.widths[site]:
        raise UserError(
            f"the autoencoder of site {str(site)!r} has width {config.d_model}: allowed is {model.widths[site]}, the "
            "width of the model there"
        )


def _warn_if_useless(site: Site, sae: SparseAutoencoder, x: Tensor, x_read: Tensor) -> None:
    """x [N, d] and x_read [N, r] are the activations of the tokens that are not padding."""
    x = x.float()
    error, size = float((x - sae(x_read.float())).square().sum()), float(x.square().sum())
    if error > size:
        log.warning("site %s: the reconstruction is further from x than zero is (%.2g times)", site, error / size)


# -------------------------------------------------------------------------------------- transcoders made elsewhere


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


@torch.no_grad()
def spliced_predictions(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: Iterable[str],
    *,
    max_tokens: int,
    batch_size: int = 16,
    context: int | None = None,
) -> dict[str, float]:
    """Cross-entropy `ce` and divergence `kl` with all sites spliced together, in nats, and the number of `tokens`."""
    totals, n_tokens = PredictionTotals(), 0
    for batch in token_batches(model, texts, max_tokens=max_tokens, batch_size=batch_size, context=context):
        for tokens in bounded(model, batch.to(model.device)):
            counted, scored = counted_tokens(model, tokens), counted_predictions(model, tokens)
            base = ModelPredictions(model.run(tokens).logits[:, :-1][scored], tokens.input_ids[:, 1:][scored])
            edits = edits_of(saes, {site: replace_with_reconstruction(sae, counted) for site, sae in saes.items()})
            totals.update(model.run(tokens, edits=edits).logits[:, :-1][scored], base)
            n_tokens += int(counted.sum())
    if not n_tokens or not totals.n_predictions:
        raise UserError("no tokens to measure predictions on: the text is empty, or each line of it is a single token")
    return {"ce": totals.cross_entropy, "kl": totals.kl, "tokens": n_tokens}
