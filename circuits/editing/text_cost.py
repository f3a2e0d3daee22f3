"""The cost of an edit on other text: cross-entropy at the behaviour's tokens and at all others, and KL divergence.

The behaviour's tokens are the predictions whose next token is one of its answers: that these suffer is what the edit is
for. Where such tokens are common, as letters are on a character model, they are mostly no answer there, and count like
all others. All sums are over predictions that count (`sae.data.batches`).

Shapes: N predictions, V vocabulary, C edited copies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from circuits.editing.records import COMMON, Behaviour
from sae.data.batches import LOGIT_BYTES, bounded, counted_predictions
from sae.data.predictions import ModelPredictions, PredictionTotals
from sae.errors import UserError
from sae.model.hook_points import Columns, SiteEdit, StandingEdit
from sae.model.language_model import LanguageModel, Tokens
from sae.model.sites import Site

KEPT_BYTES = 2**28
"""Most that the untouched model's predictions may take to be kept."""
COPIED_TOKENS = 2**13
"""Most tokens of the copies of a batch in one pass: more do not make it faster."""
Standing = Mapping[Site, StandingEdit]


class OtherText:
    """Text with the predictions of the untouched model; those of the behaviour's answers [N] apart from the others."""

    def __init__(self, model: LanguageModel, batches: Sequence[Tokens], answers: Iterable[int]) -> None:
        self.model = model
        self.batches = [part for batch in batches for part in bounded(model, batch.to(model.device))]
        self.scored = [counted_predictions(model, tokens) for tokens in self.batches]
        answer_ids = torch.tensor(sorted(set(answers)), dtype=torch.int64, device=model.device)
        targets = [tokens.input_ids[:, 1:][scored] for tokens, scored in zip(self.batches, self.scored, strict=True)]
        if not sum(map(len, targets)):
            raise UserError("the text for the cross-entropy holds no next token to predict")
        self.is_answer = [torch.isin(target, answer_ids) for target in targets]
        self.targets = targets
        self.answer_share = float(torch.cat(self.is_answer).float().mean())
        if self.answer_share > COMMON:
            self.is_answer = [torch.zeros_like(answers) for answers in self.is_answer]
        fits = 4 * sum(map(len, targets)) * model.vocab_size <= KEPT_BYTES
        self._clean = [self._predictions(number) for number in range(len(self.batches))] if fits else None

    def _predictions(self, number: int) -> tuple[ModelPredictions, ModelPredictions]:
        """The untouched model's predictions of a batch: of the answers, and of all other tokens."""
        logits = self.model.run(self.batches[number]).logits[:, :-1][self.scored[number]]
        return self._split(number, logits)

    def _split(self, number: int, logits: Tensor) -> tuple[ModelPredictions, ModelPredictions]:
        is_answer, targets = self.is_answer[number], self.targets[number]
        return ModelPredictions(logits[is_answer], targets[is_answer]), ModelPredictions(
            logits[~is_answer], targets[~is_answer]
        )

    @torch.no_grad()
    def measured(self, behaviour: Behaviour, edits: Standing) -> Behaviour:
        """The behaviour of an edited model with what the edits cost here."""
        totals = PredictionTotals(), PredictionTotals()
        for number, tokens in enumerate(self.batches):
            clean = self._predictions(number) if self._clean is None else self._clean[number]
            with self.model.edited(edits):
                logits = self.model.run(tokens).logits[:, :-1][self.scored[number]]
            is_answer = self.is_answer[number]
            for total, some, before in zip(totals, (logits[is_answer], logits[~is_answer]), clean, strict=True):
                total.update(some, before)
        n, n_other = (total.n_predictions for total in totals)
        weights = n / (n + n_other), n_other / (n + n_other)
        ce = [total.cross_entropy if total.n_predictions else None for total in totals]
        kl = [total.kl if total.n_predictions else 0.0 for total in totals]
        return replace(
            behaviour,
            ce=sum(weight * (value or 0.0) for weight, value in zip(weights, ce, strict=True)),
            ce_behaviour=ce[0],
            ce_elsewhere=ce[1],
            kl=sum(weight * value for weight, value in zip(weights, kl, strict=True)),
        )

    @torch.no_grad()
    def elsewhere(self, several: Sequence[Standing]) -> Tensor:
        """[C] cross-entropy at predictions that are none of the behaviour's, under each of several edits."""
        total, n = torch.zeros(len(several), dtype=torch.float64), 0
        for number, tokens in enumerate(self.batches):
            other, targets = ~self.is_answer[number], self.targets[number]
            n += int(other.sum())
            for start, chunk in copies(self.model, several, tokens):
                logits = run_copies(self.model, tokens, chunk)  # [C, B, S, V]
                for copy, of_copy in enumerate(logits[:, :, :-1]):
                    log_p = of_copy[self.scored[number]][other].float().log_softmax(-1)
                    total[start + copy] -= log_p.gather(1, targets[other][:, None]).cpu().double().sum()
        return total / max(n, 1)


def copies(
    model: LanguageModel, several: Sequence[Standing], tokens: Tokens, *, last_only: bool = False
) -> Iterator[tuple[int, Sequence[Standing]]]:
    """Cut several edits into as many as can be tried in one pass of copies of a batch, with the number of the first."""
    n_tokens = len(tokens) * tokens.n_positions
    n_logits = len(tokens) if last_only else n_tokens
    size = max(1, min(COPIED_TOKENS // n_tokens, LOGIT_BYTES // (4 * n_logits * model.vocab_size)))
    for start in range(0, len(several), size):
        yield start, several[start : start + size]


def run_copies(model: LanguageModel, tokens: Tokens, several: Sequence[Standing], *, last_only: bool = False) -> Tensor:
    """[C, B, S or 1, V] logits of a batch under each of several edits, in one pass over copies of it."""
    columns, n = Columns(tokens, 0, tokens.n_positions), len(tokens)

    def edit_of(site: Site) -> SiteEdit:
        def edit(x: Tensor) -> Tensor:
            blocks = zip(x.split(n), several, strict=True)
            return torch.cat([edits[site](part, columns) if site in edits else part for part, edits in blocks])

        return edit

    edits = {site: edit_of(site) for site in {site for edits in several for site in edits}}
    logits = model.run(tokens.repeat(len(several)), edits=edits, last_only=last_only).logits
    return logits.unflatten(0, (len(several), n))
