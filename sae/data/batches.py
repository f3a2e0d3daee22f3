"""Text in batches of tokens, and which of its tokens count.

1. `token_batches`: texts, each cut after the context's length, until so many tokens have been given. The texts that are
   read do not depend on the size of the batches.
2. Special tokens (BOS, EOS, ...) do not count: autoencoders are not trained on them, and a first token with a norm a
   hundred times the others' would decide every number. Nor do predictions of them: they say where a text ends, not what
   it says.

Logits of a vocabulary of 256,000 take a megabyte a token: passes hold as many rows as fit in `LOGIT_BYTES`.

Shapes: B texts, S positions, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from sae.data.text import TextSource, read_texts
from sae.model.language_model import LanguageModel
from sae.model.tokens import Tokens
from sae.sparse.activations import row_blocks

log = logging.getLogger(__name__)

CONTEXT_LENGTH = 128
"""Longest context where none is asked for: long enough for most features, and attention is still cheap."""
LOGIT_BYTES = 256 * 2**20
"""Memory for the logits [B, S, V] of one pass, in float32; several tensors of that size are there at once."""


def context_of(model: LanguageModel, context_length: int | None = None) -> int:
    """The longest context that text is read in: `context_length` tokens, or as many as the model has positions for."""
    context = CONTEXT_LENGTH if context_length is None else context_length
    if model.max_positions is not None and context > model.max_positions:
        if context_length not in (None, CONTEXT_LENGTH):
            log.warning("contexts have %d tokens, not %d: %s has no more", model.max_positions, context, model.name)
        return model.max_positions
    return context


def token_batches(
    model: LanguageModel,
    texts: str | Path | TextSource | Iterable[str],
    *,
    max_tokens: int | None,
    batch_size: int,
    context: int | None = None,
) -> Iterator[Tokens]:
    """Texts in batches of `batch_size`, each cut after `context` tokens, until `max_tokens` tokens have been given.

    The first text that does not fit any more ends them, but one is given at least. Blank texts are skipped.
    """
    remaining, first = math.inf if max_tokens is None else max_tokens, True
    length = context_of(model, context)
    lines = iter(text for text in read_texts(texts) if text.strip())
    while remaining > 0 and (chunk := list(islice(lines, batch_size))):
        tokens = model.tokenize(chunk, max_length=length)
        fitting = int((tokens.lengths.cumsum(0) <= remaining).sum())
        if fitting < len(tokens):
            tokens, remaining = tokens[: max(fitting, int(first))], 0
        remaining, first = remaining - int(tokens.lengths.sum()), False
        if len(tokens):
            yield tokens


def special(model: LanguageModel, ids: Tensor) -> Tensor:
    """Which of some token ids are special: a bool tensor of their shape."""
    return torch.isin(ids, torch.tensor(sorted(model.special_ids), dtype=torch.int64, device=ids.device))


def counted_tokens(model: LanguageModel, tokens: Tokens, *, special_tokens: bool = False) -> Tensor:
    """[B, S] bool: the tokens that count, that is no padding and, unless `special_tokens`, no special ones."""
    counted = tokens.attention_mask.bool()
    return counted if special_tokens else counted & ~special(model, tokens.input_ids)


def counted_predictions(model: LanguageModel, tokens: Tokens, *, special_tokens: bool = False) -> Tensor:
    """[B, S - 1] bool: the positions whose next token is predicted, that is there and, unless `special_tokens`, not
    special.
    """
    current, following = tokens.attention_mask[:, :-1].bool(), tokens.attention_mask[:, 1:].bool()
    predicted = current & following
    return predicted if special_tokens else predicted & ~special(model, tokens.input_ids[:, 1:])


def bounded(model: LanguageModel, tokens: Tokens) -> Iterator[Tokens]:
    """The batch in parts whose logits fit in `LOGIT_BYTES`, one text at least."""
    for rows in row_blocks(len(tokens), 4 * tokens.n_positions * model.vocab_size, LOGIT_BYTES):
        yield tokens[rows]
