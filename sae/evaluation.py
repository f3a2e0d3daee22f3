"""What autoencoders cost the model they read: reconstruction at each site, predictions with x̂ in place of x.

For each batch of text
1. run the model once and keep x at every site that has an autoencoder;
2. per site, encode and decode x: L0, explained variance, densities, ... (`sae.metrics`);
3. per site, run on with x̂ in place of x (the error e = x − x̂ is dropped), and with 0 in its place;
4. the same with all sites at once, where each autoencoder reads what the ones before it left;
5. once with x̂ + e of step 1 everywhere, the errors kept: this must give back the model's own cross-entropy;
6. if asked, all sites spliced with the error of one kept, for each in turn: how much each error matters downstream.

Padding and special tokens are left out of step 2 and keep their x in steps 3 to 6: autoencoders are not trained on
them, and a first token with a norm a hundred times the others' would decide every number.

Shapes: B texts, S positions, N = the tokens of a batch that count, d model width, F features, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sae.autoencoder import SparseAutoencoder, SparseFeatures
from sae.errors import UserError
from sae.files import without_nan
from sae.metrics import (
    DensityHistogram,
    FeatureTotals,
    PredictionTotals,
    ReconstructionTotals,
    ce_recovered,
    error_alignment,
    kl_recovered,
)
from sae.model import LanguageModel, Tokens
from sae.sites import Site
from sae.splice import check_saes
from sae.tables import aligned, number

SCHEMA_VERSION = 1
EVALUATION_FILE = "evaluation.json"
Edit = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Predictions:
    """Next-token predictions with x̂ in place of x, at one site or at several."""

    ce: float
    """Cross-entropy in nats with the errors dropped."""
    ce_zero: float
    """Cross-entropy with 0 in place of x at the same sites."""
    ce_recovered: float
    """(CE_zero − CE) / (CE_zero − CE_model); nan where zeros cost nothing."""
    kl: float
    """Mean KL divergence from the untouched model's distribution, in nats."""
    kl_recovered: float
    """(KL_zero − KL) / KL_zero."""
    top1_consistency: float
    """Share of the predictions whose most probable token is the untouched model's."""


@dataclass(frozen=True)
class SiteMetrics:
    """One autoencoder, alone in the model."""

    architecture: str
    """Its architecture."""
    n_features: int
    """Its number of features F."""
    l0: float
    """Mean number of active features per token."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    mse: float
    """Squared error, mean over tokens and dimensions."""
    cosine: float
    """Mean cosine of x and x̂."""
    l2_ratio: float
    """Mean of ‖x̂‖ / ‖x‖."""
    relative_bias: float
    """Σ‖x̂‖² / Σ⟨x, x̂⟩; 1 is unbiased."""
    shrinkage: float
    """How much stronger the features should be for the least error, as a fraction; 0 is best."""
    dead_fraction: float
    """Share of the features that never fired on the text."""
    dense_fraction: float
    """Share of the features that fired on more than a tenth of the tokens."""
    density_histogram: DensityHistogram
    """Number of features by log10 of the share of tokens they fire on."""
    predictions: Predictions
    """The model with this site's x̂ in place of x."""
    ce_error_kept: float | None
    """Cross-entropy with all sites spliced and only this site's error kept; None unless asked for. Its distance to the
    cross-entropy of all sites spliced is what this site's error matters downstream."""


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured."""

    n_tokens: int
    """Tokens the reconstruction metrics are pooled over."""
    n_predictions: int
    """Next-token predictions the cross-entropies are pooled over."""
    ce_model: float
    """Cross-entropy of the untouched model."""
    ce_errors_kept: float
    """Cross-entropy with x̂ + e at all sites: equal to `ce_model` up to rounding, or a site is wired wrongly."""
    sites: dict[str, SiteMetrics]
    """Metrics by site, in the order of the forward pass."""
    spliced: dict[str, Predictions]
    """Predictions with several sites spliced at once: `all`, and each kind that has more than one site."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; undefined numbers are None."""
        return {"schema_version": SCHEMA_VERSION, **without_nan(asdict(self))}

    def error_matters(self, site: str) -> float:
        """CE with the errors of all sites dropped − CE with this site's error kept: what it is worth downstream."""
        kept = self.sites[site].ce_error_kept
        return math.nan if kept is None else self.spliced["all"].ce - kept

    def table(self) -> str:
        """Two tables of at most 80 characters a line: x̂ beside x at each site, and the model with x̂ in place of x."""
        rebuilt = [["site", "L0", "EV", "cosine", "L2 ratio", "bias", "shrinkage", "dead", "dense"]]
        for name, m in self.sites.items():
            values = (m.explained_variance, m.cosine, m.l2_ratio, m.relative_bias, m.shrinkage)
            rebuilt.append([name, number(m.l0, 1), *map(number, (*values, m.dead_fraction, m.dense_fraction))])
        spliced = [["spliced", "CE +", "CE recovered", "KL", "KL recovered", "top-1", "error matters"]]
        spliced += [
            [name, *self._predicted(m.predictions), number(self.error_matters(name))] for name, m in self.sites.items()
        ]
        for name, p in self.spliced.items():
            spliced.append(["all sites" if name == "all" else f"all {name}", *self._predicted(p), ""])
        own = f"CE {self.ce_model:.3f} for the model itself, {self.ce_errors_kept:.3f} with every error kept"
        return "\n".join([aligned(rebuilt), "", aligned(spliced), f"{own} ({self.n_tokens:,} tokens)"])

    def _predicted(self, p: Predictions) -> list[str]:
        costs = (p.ce - self.ce_model, p.ce_recovered, p.kl, p.kl_recovered, p.top1_consistency)
        return list(map(number, costs))


def token_batches(
    model: LanguageModel, texts: Iterable[str], *, max_tokens: int | None, batch_size: int, context: int
) -> Iterator[Tokens]:
    """Texts in batches of `batch_size`, each cut after `context` tokens, until `max_tokens` tokens have been given.

    The last batch is cut to the texts that still fit, but is never empty; blank texts are skipped.
    """
    remaining = math.inf if max_tokens is None else max_tokens
    lines = iter(text for text in texts if text.strip())
    while remaining > 0 and (chunk := list(islice(lines, batch_size))):
        tokens = model.tokenize(chunk, max_length=context)
        fitting = int((tokens.lengths.cumsum(0) <= remaining).sum())
        if fitting < len(tokens):
            tokens = tokens[: max(fitting, 1)]
            remaining = 0
        remaining -= int(tokens.lengths.sum())
        yield tokens


def counted_tokens(model: LanguageModel, tokens: Tokens, *, special_tokens: bool) -> Tensor:
    """[B, S] bool: the tokens that count, that is no padding and, unless `special_tokens`, no special ones."""
    counted = tokens.attention_mask.bool()
    if not special_tokens and model.special_ids:
        special = torch.tensor(sorted(model.special_ids), device=tokens.input_ids.device)
        counted = counted & ~torch.isin(tokens.input_ids, special)
    return counted


def decode_sparse(sae: SparseAutoencoder, features: SparseFeatures, n_tokens: int) -> Tensor:
    """x̂ [N, d] from nonzero features sorted by token: the same as `sae.decode` without the [N, F] in between."""
    count = torch.bincount(features.token, minlength=n_tokens)
    offsets = count.cumsum(0) - count  # [N] where each token's features begin
    return sae.b_dec + embedding_bag(
        features.feature, sae.W_dec, offsets, mode="sum", per_sample_weights=features.value.to(sae.W_dec.dtype)
    )


def reconstruct(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """x [N, d] -> x̂ [N, d] in x's precision, without an [N, F] in between."""
    return decode_sparse(sae, sae.encode_sparse(x), len(x)).to(x.dtype)


class _SiteTotals:
    """The sums of one site."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self.reconstruction = ReconstructionTotals()
        self.features = FeatureTotals(sae.config.n_features)

    def update(self, x: Tensor) -> Tensor:
        """Add tokens x [N, d]; gives x̂ [N, d]."""
        features = self.sae.encode_sparse(x)
        x_hat = decode_sparse(self.sae, features, len(x))
        alignment = error_alignment(x.to(x_hat) - x_hat, self.sae.W_dec, features.token, features.feature)
        self.reconstruction.update(x, x_hat)
        self.features.update(features.feature, features.value, len(x), alignment=alignment)
        return x_hat.to(x.dtype)

    def result(self, predictions: Predictions, ce_error_kept: float | None) -> SiteMetrics:
        r, f = self.reconstruction, self.features
        return SiteMetrics(
            architecture=self.sae.config.architecture,
            n_features=self.sae.config.n_features,
            l0=f.l0,
            explained_variance=r.explained_variance,
            mse=r.mse,
            cosine=r.cosine,
            l2_ratio=r.l2_ratio,
            relative_bias=r.relative_bias,
            shrinkage=f.shrinkage,
            dead_fraction=f.dead_fraction,
            dense_fraction=f.dense_fraction,
            density_histogram=f.density_histogram(),
            predictions=predictions,
            ce_error_kept=ce_error_kept,
        )


class _SplicedTotals:
    """The sums of the model with some sites replaced, by x̂ and by 0."""

    def __init__(self) -> None:
        self.sae, self.zero = PredictionTotals(), PredictionTotals()

    def result(self, ce_model: float) -> Predictions:
        ce, ce_zero = self.sae.cross_entropy, self.zero.cross_entropy
        return Predictions(
            ce=ce,
            ce_zero=ce_zero,
            ce_recovered=ce_recovered(ce_model=ce_model, ce_sae=ce, ce_zero=ce_zero),
            kl=self.sae.kl,
            kl_recovered=kl_recovered(kl_sae=self.sae.kl, kl_zero=self.zero.kl),
            top1_consistency=self.sae.top1_consistency,
        )


def splice(sae: SparseAutoencoder, counted: Tensor) -> Edit:
    """An edit x [B, S, d] -> x̂ at the counted tokens, x elsewhere. counted: [B, S]."""
    return lambda x: x.masked_scatter(counted[..., None], reconstruct(sae, x[counted]))


def _zero(counted: Tensor) -> Edit:
    return lambda x: x.masked_fill(counted[..., None], 0.0)


def _constant(value: Tensor) -> Edit:
    return lambda x: value


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: Iterable[str],
    *,
    max_tokens: int | None = 50_000,
    batch_size: int = 16,
    context: int = 128,
    special_tokens: bool = False,
    errors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Metrics of each autoencoder alone and of all of them together, pooled over the text.

    Each batch costs two forward passes a site (from that site on) and four to ten more. Texts are cut after `context`
    tokens. `special_tokens` counts BOS and the like as any other token. `errors` measures what each site's error
    matters among the others, at one more pass a site. `progress` is called after each batch with its number of tokens.
    """
    check_saes(model, saes)
    loop = _Loop(model, dict(sorted(saes.items())), special_tokens=special_tokens, errors=errors)
    for tokens in token_batches(model, texts, max_tokens=max_tokens, batch_size=batch_size, context=context):
        loop.update(tokens.to(model.device))
        if progress is not None:
            progress(int(tokens.lengths.sum()))
    if not loop.model_totals.n_predictions or not loop.n_tokens:
        raise UserError("no tokens to evaluate on: the text is empty, or each line of it is a single token")
    return loop.result()


class _Loop:
    """All sums of an evaluation, and the passes that add one batch to them."""

    def __init__(
        self, model: LanguageModel, saes: dict[Site, SparseAutoencoder], *, special_tokens: bool, errors: bool
    ) -> None:
        self.model, self.saes, self.special_tokens = model, saes, special_tokens
        self.n_tokens = 0
        self.model_totals, self.kept_totals = PredictionTotals(), PredictionTotals()
        self.sites = {site: _SiteTotals(sae) for site, sae in saes.items()}
        self.alone = {site: _SplicedTotals() for site in saes}
        self.groups = _groups(list(saes))
        self.together = {name: _SplicedTotals() for name in self.groups}
        self.error_kept = {site: PredictionTotals() for site in saes if errors}

    def update(self, tokens: Tokens) -> None:
        """Add one batch."""
        counted = counted_tokens(self.model, tokens, special_tokens=self.special_tokens)  # [B, S]
        mask = tokens.attention_mask.bool()
        scored = mask[:, :-1] & mask[:, 1:]  # [B, S-1] predictions whose next token is there
        targets = tokens.input_ids[:, 1:][scored]
        residuals = [site for site in self.model.sites if site.kind in ("embed", "resid")]
        base = self.model.run(tokens, capture={*self.saes, *residuals})
        base_logits = base.logits[:, :-1][scored]  # [N, V]

        def add(totals: PredictionTotals, **replaced: Any) -> None:
            totals.update(self.model.run(tokens, **replaced).logits[:, :-1][scored], targets, base_logits)

        self.model_totals.update(base_logits, targets, base_logits)
        self.n_tokens += int(counted.sum())
        kept: dict[Site, Edit] = {}
        for site, totals in self.sites.items():
            x = base.activations[site]
            x_hat = x.masked_scatter(counted[..., None], totals.update(x[counted]))
            before = self.model.resume_from(site, base.activations)
            add(self.alone[site].sae, skip={**before, site: x_hat})
            add(self.alone[site].zero, skip={**before, site: _zero(counted)(x)})
            kept[site] = _constant(x_hat + (x - x_hat))
        for name, group in self.groups.items():
            add(self.together[name].sae, edits={site: splice(self.saes[site], counted) for site in group})
            add(self.together[name].zero, edits={site: _zero(counted) for site in group})
        add(self.kept_totals, edits=kept)
        for kept_site, error_kept in self.error_kept.items():  # x̂ + e is x: nothing to splice there
            others = {site: sae for site, sae in self.saes.items() if site != kept_site}
            add(error_kept, edits={site: splice(sae, counted) for site, sae in others.items()})

    def result(self) -> Evaluation:
        ce_model = self.model_totals.cross_entropy
        kept = {site: totals.cross_entropy for site, totals in self.error_kept.items()}
        return Evaluation(
            n_tokens=self.n_tokens,
            n_predictions=self.model_totals.n_predictions,
            ce_model=ce_model,
            ce_errors_kept=self.kept_totals.cross_entropy,
            sites={
                site.name: totals.result(self.alone[site].result(ce_model), kept.get(site))
                for site, totals in self.sites.items()
            },
            spliced={name: totals.result(ce_model) for name, totals in self.together.items()},
        )


def _groups(sites: list[Site]) -> dict[str, list[Site]]:
    """Sites that are spliced together: each kind with more than one site (where there are several kinds), and all."""
    kinds = {kind: [site for site in sites if site.kind == kind] for kind in ("attn", "mlp", "resid")}
    groups = {kind: members for kind, members in kinds.items() if 1 < len(members) < len(sites)}
    return groups | {"all": sites}
