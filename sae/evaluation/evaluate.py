"""Evaluation of autoencoders in the model they read: reconstruction at each site, predictions with x̂ in place of x.

For each batch of text
1. run the model once and keep x at every site that has an autoencoder;
2. per site, run on with 0 in place of x, and the same with several sites at once;
3. per autoencoder, encode and decode x: L0, explained variance, densities, ... (`sae.evaluation.metrics`);
4. per autoencoder, run on with x̂ in place of x (the error e = x − x̂ is dropped);
5. the same with several sites at once, where each autoencoder reads what the ones before it left;
6. once with x̂ + e of step 3 everywhere, the errors kept: this must give back the model's own cross-entropy;
7. if asked, all sites spliced with the error of one kept, for each in turn: how much each error matters downstream.

Any number of runs, each with an autoencoder a site, share steps 1 and 2 (`Evaluator`). All that is kept between
batches are sums, which can be written to disk and taken up again.

Padding and special tokens are left out of step 3 and keep their x in all others, and predictions of them are left out
everywhere (`sae.data.batches`).

Shapes: B texts, S positions, N = the tokens of a batch that count, d model width, F features, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.data.batches import bounded, counted_predictions, counted_tokens, token_batches
from sae.data.predictions import ModelPredictions, PredictionTotals, Totals
from sae.data.text import TextSource
from sae.errors import UserError
from sae.evaluation.metrics import FeatureTotals, ReconstructionTotals, ce_recovered, error_alignment, kl_recovered
from sae.evaluation.results import Evaluation, Predictions, SiteMetrics
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site
from sae.saes import as_saes
from sae.splice import decode_sparse, edits_of, ensure_checked, replace_with_reconstruction

Saes = Mapping[Site, SparseAutoencoder]


class _SiteTotals:
    """The sums of one site."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae = sae
        self.reconstruction = ReconstructionTotals()
        self.features = FeatureTotals(sae.config.n_features)

    def update(self, x: Tensor, x_read: Tensor) -> Tensor:
        """Add tokens x [N, d] with what the dictionary reads of them [N, r]; gives x̂ [N, d]."""
        features = self.sae.encode_sparse(x_read)
        x_hat = self.sae.with_skip(decode_sparse(self.sae, features, len(x)), x_read)
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


def _zero(counted: Tensor) -> SiteEdit:
    return lambda x: x.masked_fill(counted[..., None], 0.0)


def _constant(value: Tensor) -> SiteEdit:
    return lambda x: value


@torch.no_grad()
def evaluate_saes(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    texts: str | Path | TextSource | Iterable[str],
    *,
    max_tokens: int | None = 50_000,
    batch_size: int = 16,
    context: int | None = None,
    special_tokens: bool = False,
    errors: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Evaluation:
    """Measure how good the autoencoders of a model are: each alone in the model, and all of them together.

    Each batch costs two forward passes a site (from that site on) and four to ten more.

    Args:
        model: the model they read.
        saes: the autoencoders by site.
        texts: documents, a .txt or .jsonl file, or a hub data set.
        max_tokens: how many tokens of it to measure on; None for all.
        batch_size: texts that go through the model at once.
        context: tokens after which a text is cut; 128 by default, less if the model takes less.
        special_tokens: whether BOS and the like count as any other token.
        errors: whether to measure what each site's error matters while all others are dropped, at one more pass a site.
        progress: called after each batch with its number of tokens.

    Returns:
        The metrics, pooled over the text: L0, explained variance, cosine, dead and dense fractions, cross-entropy
        recovered and KL divergence in nats; see `Evaluation` and `SiteMetrics` for each with its formula.

    Raises:
        UserError: an autoencoder does not fit the model, or the text is empty.
    """
    measurement = Evaluator(model, {"": saes}, special_tokens=special_tokens, errors=errors)
    for tokens in token_batches(model, texts, max_tokens=max_tokens, batch_size=batch_size, context=context):
        measurement.update(tokens)
        if progress is not None:
            progress(int(tokens.lengths.sum()))
    return measurement.results()[""]


@dataclass(frozen=True)
class _Batch:
    """A batch of text, and what the untouched model makes of it."""

    tokens: Tokens
    counted: Tensor
    """[B, S] whether a token counts."""
    scored: Tensor
    """[B, S - 1] whether the prediction of the next token counts."""
    activations: Mapping[Site, Tensor]
    """x [B, S, d] by site."""
    predictions: ModelPredictions
    """The model's own."""


class Evaluator:
    """Sums over batches for several runs of autoencoders by site; passes without autoencoders are made once for all."""

    def __init__(
        self, model: LanguageModel, runs: Mapping[str, Saes], *, special_tokens: bool = False, errors: bool = False
    ) -> None:
        for saes in runs.values():
            ensure_checked(model, saes)
        self.model, self.special_tokens = model, special_tokens
        self.n_batches = self.n_tokens = 0
        self.model_totals = PredictionTotals()
        self.runs = {name: _Run(dict(sorted(saes.items())), errors=errors) for name, saes in runs.items()}
        zeroed = [group for run in self.runs.values() for group in run.zeroed]
        self.zero = {group: PredictionTotals() for group in dict.fromkeys(zeroed)}

    @torch.no_grad()
    def update(self, tokens: Tokens) -> None:
        """Add one batch, in parts whose logits are not too large."""
        for part in bounded(self.model, tokens.to(self.model.device)):
            self._update(self._clean(part))
        self.n_batches += 1

    def _update(self, batch: _Batch) -> None:
        for group, totals in self.zero.items():
            zero = _zero(batch.counted)
            if len(group) == 1:
                before = self.model.resume_from(group[0], batch.activations)
                skip = {**before, group[0]: zero(batch.activations[group[0]])}
                totals.update(self._logits(batch, skip=skip), batch.predictions)
            else:
                totals.update(self._logits(batch, edits=dict.fromkeys(group, zero)), batch.predictions)
        for run in self.runs.values():
            self._add(run, batch)
        self.n_tokens += int(batch.counted.sum())

    def _clean(self, tokens: Tokens) -> _Batch:
        """The pass that everything is compared with."""
        scored = counted_predictions(self.model, tokens, special_tokens=self.special_tokens)
        residuals = [site for site in self.model.sites if site.kind in ("embed", "resid")]
        sites = {where for run in self.runs.values() for pair in run.reads.items() for where in pair}
        base = self.model.run(tokens, capture={*sites, *residuals})
        logits = base.logits[:, :-1][scored]
        predictions = ModelPredictions(logits, tokens.input_ids[:, 1:][scored])
        self.model_totals.update(logits, predictions)
        counted = counted_tokens(self.model, tokens, special_tokens=self.special_tokens)
        return _Batch(tokens, counted, scored, base.activations, predictions)

    def _add(self, run: _Run, batch: _Batch) -> None:
        """The passes of one run."""
        counted, identities = batch.counted, dict[Site, SiteEdit]()
        for site, totals in run.sites.items():
            x = batch.activations[site]
            x_read = batch.activations[run.reads[site]]
            x_hat = x.masked_scatter(counted[..., None], totals.update(x[counted], x_read[counted]))
            skip = {**self.model.resume_from(site, batch.activations), site: x_hat}
            run.alone[site].update(self._logits(batch, skip=skip), batch.predictions)
            identities[site] = _constant(x_hat + (x - x_hat))
        edits = {site: replace_with_reconstruction(sae, counted) for site, sae in run.saes.items()}
        for name, group in run.groups.items():
            logits = self._logits(batch, edits=edits_of(run.saes, {site: edits[site] for site in group}))
            run.together[name].update(logits, batch.predictions)
        run.errors_kept.update(self._logits(batch, edits=identities), batch.predictions)
        for kept_site, error_kept in run.error_kept.items():  # x̂ + e is x: nothing to splice there
            others = {site: edit for site, edit in edits.items() if site != kept_site}
            error_kept.update(self._logits(batch, edits=edits_of(run.saes, others)), batch.predictions)

    def _logits(
        self, batch: _Batch, *, edits: Mapping[Site, SiteEdit] | None = None, skip: Mapping[Site, Tensor] | None = None
    ) -> Tensor:
        """[N, V] of the scored predictions in a changed run."""
        return self.model.run(batch.tokens, edits=edits, skip=skip).logits[:, :-1][batch.scored]

    def results(self) -> dict[str, Evaluation]:
        """The metrics, by the names of the runs."""
        if not self.model_totals.n_predictions or not self.n_tokens:
            raise UserError("no tokens to evaluate on: the text is empty, or each line of it is a single token")
        return {name: self._result(run) for name, run in self.runs.items()}

    def _result(self, run: _Run) -> Evaluation:
        ce_error_kept = {site: totals.cross_entropy for site, totals in run.error_kept.items()}
        return Evaluation(
            n_tokens=self.n_tokens,
            n_predictions=self.model_totals.n_predictions,
            ce_model=self.model_totals.cross_entropy,
            ce_errors_kept=run.errors_kept.cross_entropy,
            sites={
                site.name: totals.result(self._spliced(run.alone[site], (site,)), ce_error_kept.get(site))
                for site, totals in run.sites.items()
            },
            spliced={name: self._spliced(totals, run.groups[name]) for name, totals in run.together.items()},
        )

    def _spliced(self, sae: PredictionTotals, group: Sequence[Site]) -> Predictions:
        ce_model, zero = self.model_totals.cross_entropy, self.zero[tuple(group)]
        return Predictions(
            ce=sae.cross_entropy,
            ce_zero=zero.cross_entropy,
            ce_recovered=ce_recovered(ce_model=ce_model, ce_sae=sae.cross_entropy, ce_zero=zero.cross_entropy),
            kl=sae.kl,
            kl_recovered=kl_recovered(kl_sae=sae.kl, kl_zero=zero.kl),
            top1_consistency=sae.top1_consistency,
        )

    def state(self) -> dict[str, Tensor]:
        """All sums by name, to be kept on disk."""
        sums = {f"{name}/{key}": value for name, totals in self._totals() for key, value in totals.state().items()}
        return sums | {"n_batches": torch.tensor(self.n_batches), "n_tokens": torch.tensor(self.n_tokens)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Goes on after the batches of a `state` of the same runs."""
        for name, totals in self._totals():
            prefix = f"{name}/"
            totals.restore({key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)})
        self.n_batches, self.n_tokens = int(state["n_batches"]), int(state["n_tokens"])

    def _totals(self) -> Iterator[tuple[str, Totals]]:
        yield "model", self.model_totals
        for group, totals in self.zero.items():
            yield "zero/" + "+".join(site.name for site in group), totals
        for name, run in self.runs.items():
            for key, run_totals in run.totals():
                yield f"run {name}/{key}", run_totals


class _Run:
    """Autoencoders by site, and their sums."""

    def __init__(self, saes: dict[Site, SparseAutoencoder], *, errors: bool) -> None:
        self.saes = saes
        self.reads = as_saes(saes).read_sites(saes)
        self.sites = {site: _SiteTotals(sae) for site, sae in saes.items()}
        self.alone = {site: PredictionTotals() for site in saes}
        self.groups = _groups(list(saes))
        self.together = {name: PredictionTotals() for name in self.groups}
        self.errors_kept = PredictionTotals()
        self.error_kept = {site: PredictionTotals() for site in saes if errors}

    @property
    def zeroed(self) -> list[tuple[Site, ...]]:
        """Sites that zeros are put in place of together."""
        return [*((site,) for site in self.saes), *map(tuple, self.groups.values())]

    def totals(self) -> Iterator[tuple[str, Totals]]:
        """Yield all sums by name."""
        yield "kept", self.errors_kept
        for name, totals in self.together.items():
            yield f"together/{name}", totals
        for site, site_totals in self.sites.items():
            yield f"{site}/reconstruction", site_totals.reconstruction
            yield f"{site}/features", site_totals.features
            yield f"{site}/alone", self.alone[site]
        for site, totals in self.error_kept.items():
            yield f"{site}/error kept", totals


def _groups(sites: list[Site]) -> dict[str, list[Site]]:
    """Sites that are spliced together: each kind with more than one site (where there are several kinds), and all."""
    kinds = {kind: [site for site in sites if site.kind == kind] for kind in ("attn", "mlp", "resid")}
    groups = {kind: members for kind, members in kinds.items() if 1 < len(members) < len(sites)}
    return groups | {"all": sites}
