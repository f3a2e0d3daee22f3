"""Predictions of next tokens: cross-entropy, KL divergence from the untouched model, and whether the top token stays.

1. `cross_entropy`: the mean of −log p(next token) over the predictions of a text that count (`sae.data.batches`).
2. `PredictionTotals` collects the same sum, and that of KL(p ‖ q) and of equal top tokens, for a changed model.

A batch only ever adds to sums and a ratio is taken once, at the end. Sums are float64.

Shapes: N predictions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sae.data.batches import bounded, counted_predictions
from sae.errors import UserError
from sae.model.hook_points import SiteEdit
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens
from sae.sparse.activations import row_blocks

CHUNK_BYTES = 64 * 2**20
"""Largest [rows, V] intermediate of predictions, in float32."""


def double(x: Tensor) -> Tensor:
    """x in float64; on the CPU where the device has no float64 (MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def total(x: Tensor) -> float:
    """Σ x in float64."""
    return float(double(x).sum())


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, nan where it is undefined."""
    return numerator / denominator if denominator else math.nan


class Totals:
    """Running sums, all of them attributes: numbers and tensors."""

    def state(self) -> dict[str, Tensor]:
        """The sums as tensors, to be kept on disk; numbers keep all their bits."""
        kinds = {int: torch.int64, float: torch.float64}
        return {
            name: value if isinstance(value, Tensor) else torch.tensor(value, dtype=kinds[type(value)])
            for name, value in vars(self).items()
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Takes over what `state` gave."""
        for name, value in vars(self).items():
            setattr(self, name, state[name] if isinstance(value, Tensor) else state[name].item())


def negative_log_likelihood(log_q: Tensor, targets: Tensor) -> float:
    """−Σ log q(target) in nats, of log-probabilities [N, V] and token ids [N]."""
    return -total(log_q.gather(-1, targets[:, None]))


class ModelPredictions:
    """Log-probabilities of next tokens in the untouched model, computed once for all that is compared."""

    def __init__(self, logits: Tensor, targets: Tensor) -> None:
        self.targets = targets  # [N] token ids
        self.parts = row_blocks(len(targets), 4 * logits.shape[-1], CHUNK_BYTES)
        self.log_p = torch.empty(logits.shape, device=logits.device)  # [N, V]
        for part in self.parts:
            self.log_p[part] = logits[part].float().log_softmax(-1)
        self.top = self.log_p.argmax(-1)  # [N]


class PredictionTotals(Totals):
    """Running sums over next-token predictions, compared with those of the untouched model."""

    def __init__(self) -> None:
        self.n_predictions = 0
        self._ce = 0.0
        self._kl = 0.0
        self._same_top = 0

    def update(self, logits: Tensor, model: ModelPredictions) -> None:
        """Add predictions. logits: [N, V] for the tokens that the model's predictions are for."""
        for part in model.parts:
            log_q, log_p = logits[part].float().log_softmax(-1), model.log_p[part]
            self._ce += negative_log_likelihood(log_q, model.targets[part])
            p = log_p.exp()
            self._kl += total((p * (log_p - log_q)).masked_fill(p == 0, 0.0).sum(-1))  # 0 · (−inf − −inf) counts 0
            self._same_top += int((log_q.argmax(-1) == model.top[part]).sum())
        self.n_predictions += len(model.targets)

    @property
    def cross_entropy(self) -> float:
        """−Σ log q(next token) / N, in nats."""
        return ratio(self._ce, self.n_predictions)

    @property
    def kl(self) -> float:
        """Σ KL(p ‖ q) / N, in nats: p the untouched model's distribution, q the one compared."""
        return ratio(self._kl, self.n_predictions)

    @property
    def top1_consistency(self) -> float:
        """Share of the predictions whose most probable token is the untouched model's."""
        return ratio(float(self._same_top), self.n_predictions)


@torch.no_grad()
def cross_entropy(
    model: LanguageModel, batches: Iterable[Tokens], *, edits: Mapping[Site, SiteEdit] | None = None
) -> float:
    """Mean of −log p(next token) in nats over the predictions that count; `edits` as in `LanguageModel.run`."""
    sum_, n_predictions = 0.0, 0
    for batch in batches:
        for tokens in bounded(model, batch.to(model.device)):
            logits, scored = model.run(tokens, edits=edits).logits[:, :-1], counted_predictions(model, tokens)
            for row, counted, targets in zip(logits, scored, tokens.input_ids[:, 1:], strict=True):
                predicted, wanted = row[counted], targets[counted]
                sum_ += sum(
                    negative_log_likelihood(predicted[part].float().log_softmax(-1), wanted[part])
                    for part in row_blocks(len(wanted), 4 * logits.shape[-1], CHUNK_BYTES)
                )
            n_predictions += int(scored.sum())
    if n_predictions == 0:
        raise UserError("the text for the cross-entropy holds no next token to predict")
    return sum_ / n_predictions
