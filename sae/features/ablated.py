"""The effect of a feature in the contexts that are shown: its activation at each token, and how much less or more
probable each token is without it.

    x' = x − f_i W_dec[i]  at the feature's site, at every token before the one that is predicted
    change_t = log p(token_t | x') − log p(token_t | x)

which is what Towards Monosemanticity (Bricken et al. 2023) underlines tokens by. The error and all other features stay.
Special tokens do not count: there f_i is taken to be zero.

1. Contexts of many features at one site share a batch, longest first: each row has an edit of its own.
2. The texts of a batch are run once, untouched, up to the last token that is shown; the edited run starts at the site.
3. Where the feature is nowhere on, as in most contexts drawn from all of the text, nothing changes and nothing is run.

Shapes: R rows (feature, text), U texts, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sae.autoencoder import SparseAutoencoder
from sae.data.batches import LOGIT_BYTES, special
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens

BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Row:
    """A text up to the last token that is shown of it, and a feature."""

    slot: int
    """The feature's place among those asked about."""
    text: int
    """The text's number."""
    length: int
    """Tokens of the text that are read."""


def measure_rows(
    model: LanguageModel, site: Site, sae: SparseAutoencoder, features: Sequence[int], texts: Mapping[int, Tensor],
    rows: Sequence[Row],
) -> dict[Row, tuple[Tensor, Tensor]]:  # fmt: skip
    """For each row its feature's activations [length] and the change of each token's log-probability [length] when the
    feature is ablated; the first token is not predicted, its change is NaN.
    """
    measured: dict[Row, tuple[Tensor, Tensor]] = {}
    for batch in _batches(model, rows):
        f, change = _measure(model, site, sae, features, texts, batch)
        for row, of_row, changed in zip(batch, f, change, strict=True):
            measured[row] = of_row[-row.length :], changed[-row.length :]
    return measured


def _batches(model: LanguageModel, rows: Sequence[Row]) -> Iterator[list[Row]]:
    """Rows of about equal length, and of equal length where padding shows, as many as fit."""
    most = min(BATCH_TOKENS, max(1, LOGIT_BYTES // (4 * model.vocab_size)))
    batch: list[Row] = []
    for row in sorted(set(rows), key=lambda row: (-row.length, row.text, row.slot)):
        full = batch and (len(batch) + 1) * batch[0].length > most
        if full or (batch and model.padding_shows and row.length != batch[0].length):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


@torch.no_grad()
def _measure(
    model: LanguageModel, site: Site, sae: SparseAutoencoder, features: Sequence[int], texts: Mapping[int, Tensor],
    rows: Sequence[Row],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """f [R, S] and the change of log p [R, S], on the CPU."""
    unique = sorted({(row.text, row.length) for row in rows}, key=lambda pair: -pair[1])
    tokens = Tokens.from_rows([texts[text][:length].tolist() for text, length in unique]).to(model.device)
    number_of = {pair: number for number, pair in enumerate(unique)}
    text = torch.tensor([number_of[row.text, row.length] for row in rows], device=model.device)  # [R]
    parents = set(model.parents(site, model.sites).values())
    read = sae.config.read_site(site)
    base = model.run(tokens, capture={site, read, *parents})

    slots, column = torch.tensor([row.slot for row in rows]).unique(return_inverse=True)
    index = torch.tensor(features)[slots].to(sae.device)
    counted = tokens.attention_mask.bool() & ~special(model, tokens.input_ids)
    encoded = sae.encode_some(base.activations[read], index) * counted[..., None]  # [U, S, distinct features]
    column = column.to(model.device)
    f = encoded[text, :, column]  # [R, S]
    change = torch.zeros(f.shape, device=f.device)
    change[:, 0] = torch.nan
    on = (f != 0).any(1).nonzero()[:, 0]
    if len(on):
        removed = f[on, :, None] * sae.W_dec[index[column[on]]][:, None]  # [rows where it is on, S, d]
        cache = {parent: base.activations[parent][text[on]] for parent in parents}
        those = tokens[text[on]]
        edited = model.run(those, edits={site: lambda x: x - removed.to(x.dtype)}, skip=model.resume_from(site, cache))
        change[on, 1:] = _log_p(edited.logits, those) - _log_p(base.logits, tokens)[text[on]]
    first = tokens.n_positions - tokens.lengths[text]  # the token that nothing predicts
    change[torch.arange(len(rows), device=first.device), first] = torch.nan
    return f.float().cpu(), change.cpu()


def _log_p(logits: Tensor, tokens: Tokens) -> Tensor:
    """The log-probability of each token but the first, [B, S - 1], of logits [B, S, V]."""
    following = logits[:, :-1].float()
    return following.gather(-1, tokens.input_ids[:, 1:, None])[..., 0] - following.logsumexp(-1)
