"""From text to shuffled activations of all sites, with one forward pass of the model a batch of text.

1. `ContextStream` reads documents and cuts each into contexts of at most `context_length` tokens (every context begins
   with the BOS token if the tokenizer writes one), or packs documents end to end into contexts of exactly that length.
   Contexts of a group of documents are sorted by length, so that little is padding. After the last it starts over.
2. `ModelActivations.fill` runs the model on contexts until the buffer [n, d] of every site is full. Padding and the
   tokenizer's special tokens are left out: a BOS token's activation is often a hundred times as long as any other.
3. The rows are dealt out once, in a random order that depends on the seed and the number of the fill alone.

A position in the text is three values (`StreamState`). Resuming runs the model again on the contexts of the
fill it was in, so a checkpoint holds no activations.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from sae.autoencoder import CONTEXT_LENGTH as CONTEXT_LENGTH_ENTRY
from sae.autoencoder import EXCLUDE_SPECIAL, PREPEND_BOS
from sae.data.batches import CONTEXT_LENGTH, counted_tokens
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import Site
from sae.model.tokens import Tokens

log = logging.getLogger(__name__)

GROUP_DOCUMENTS = 64
"""Documents tokenized and sorted by length together."""
FORWARD_TOKENS = 4096
"""Tokens, padding counted, in one forward pass."""


@dataclass(frozen=True)
class StreamState:
    """A position in the text; JSON-able."""

    epoch: int = 0
    """Times the whole text has been read."""
    documents: int = 0
    """Documents read in this epoch."""
    pending: tuple[tuple[int, ...], ...] = ()
    """Contexts cut but not given out yet."""
    rest: tuple[int, ...] = ()
    """Tokens of the last document that wait for a full context, when packed."""


@dataclass(frozen=True)
class TextRead:
    """The amount of a text that was read."""

    documents: int
    """Documents, from the first on."""
    is_all: bool
    """Whether that was all of it, so that nothing is held out."""


class ContextStream:
    """Batches of contexts from a text, endlessly."""

    def __init__(
        self, model: LanguageModel, source: TextSource, *, context_length: int | None = None, packed: bool = False,
        forward_tokens: int = FORWARD_TOKENS,
    ):  # fmt: skip
        longest = model.max_positions or context_length or CONTEXT_LENGTH
        context_length = min(CONTEXT_LENGTH, longest) if context_length is None else context_length
        if not 2 <= context_length <= longest:
            raise UserError(f"context length is {context_length}, allowed are 2 to {longest} for {model.name}")
        self.model, self.source = model, source
        self.context_length, self.packed, self.forward_tokens = context_length, packed, forward_tokens
        self.state = StreamState()
        self.length: int | None = None  # documents of the whole text, once its end was seen
        self._documents: Iterator[str] | None = None
        self._read_from_start, self._has_tokens = True, False  # of this epoch
        first = model.tokenizer("a")["input_ids"][:1]
        self._prefix = tuple(first) if first and first[0] in model.special_ids else ()
        self.prepends_bos = bool(self._prefix)

    def seek(self, state: StreamState) -> None:
        """Goes on from a position; from where it is without opening the text again."""
        if state == self.state:
            return
        self.state, self._documents = state, None
        self._read_from_start, self._has_tokens = state.documents == 0, False

    def peek(self) -> list[tuple[int, ...]]:
        """The contexts of the next forward pass, longest first, which stay where they are."""
        while not self.state.pending:
            self._read_group()
        contexts = self.state.pending
        return list(contexts[: max(1, self.forward_tokens // len(contexts[0]))])

    def take(self) -> Tokens:
        """The contexts of the next forward pass, left-padded."""
        rows = self.peek()
        self.state = replace(self.state, pending=self.state.pending[len(rows) :])
        return Tokens.from_rows(rows)

    def _read_group(self) -> None:
        if self._documents is None:
            self._documents = self.source.read(self.state.documents)
        texts = [text for _, text in zip(range(GROUP_DOCUMENTS), self._documents, strict=False)]
        if not texts and self.state.documents == 0:
            raise UserError(f"the text {self.source.name!r} is empty: give one with at least one document")
        if not texts:
            self.length = self.state.documents
            if self._read_from_start and not self._has_tokens:
                raise UserError(
                    f"the text {self.source.name!r} has no tokens: the tokenizer of {self.model.name} makes none of "
                    f"any of its {self.length:,} documents"
                )
            self._read_from_start, self._has_tokens = True, False
            self.state = replace(self.state, epoch=self.state.epoch + 1, documents=0)
            self._documents = None
            log.info("the text was read %d times; it is read again from the beginning", self.state.epoch)
            return
        contexts, rest = self._cut(texts)
        contexts.sort(key=len, reverse=True)
        documents = self.state.documents + len(texts)
        self.state = replace(self.state, documents=documents, pending=tuple(contexts), rest=rest)

    def _cut(self, texts: Sequence[str]) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """Contexts of some documents, and what is left for the next when packed."""
        rows = [tuple(row) for row in self.model.tokenizer(list(texts), verbose=False)["input_ids"]]
        self._has_tokens = self._has_tokens or any(len(row) > len(self._prefix) for row in rows)
        body = self.context_length - len(self._prefix)
        if self.packed:
            stream = self.state.rest + tuple(token for row in rows for token in row)
            end = len(stream) - len(stream) % body
            return [self._prefix + stream[i : i + body] for i in range(0, end, body)], stream[end:]
        contexts = []
        for row in rows:
            tokens = row[len(self._prefix) :]
            contexts += [self._prefix + tokens[i : i + body] for i in range(0, len(tokens), body)]
        return contexts, ()


class ActivationSource(Protocol):
    """Source of a trainer's data: rows of activations of several sites, in fills that can be made again."""

    widths: dict[Site, int]
    """Width of each site."""

    rows_at_once: int
    """Rows that one reading gives at most: a buffer must hold as many."""
    reading: dict[str, Any]
    """How text is read, by the entries of `SAEConfig.extra`."""

    def position(self) -> StreamState:
        """The position in the text at which the next fill begins."""

    def seek(self, state: StreamState) -> None:
        """Makes the next fill begin there."""

    def fill(self, buffer: dict[Site, Tensor]) -> int:
        """Writes rows into [n, width] tensors and returns how many; the same rows from the same position."""

    def text_read(self) -> TextRead:
        """How much of the text the rows that were given so far come from."""


class ModelActivations:
    """Activations from forward passes of the model."""

    def __init__(
        self, model: LanguageModel, stream: ContextStream, sites: Sequence[Site], *, exclude_special: bool = True
    ):
        self.model, self.stream, self.sites = model, stream, tuple(sites)
        self.widths = {site: model.read_width(site) for site in sites}
        self.rows_at_once = max(stream.forward_tokens, stream.context_length)
        self.exclude_special = exclude_special
        self.reading: dict[str, Any] = {
            CONTEXT_LENGTH_ENTRY: stream.context_length,
            PREPEND_BOS: stream.prepends_bos,
            EXCLUDE_SPECIAL: exclude_special,
        }

    def position(self) -> StreamState:
        return self.stream.state

    def seek(self, state: StreamState) -> None:
        self.stream.seek(state)

    def text_read(self) -> TextRead:
        state = self.stream.state
        return TextRead(self.stream.length or state.documents, state.epoch > 0)

    def fill(self, buffer: dict[Site, Tensor], ids: Tensor | None = None, *, one_epoch: bool = False) -> int:
        """Runs the model until no further batch fits, or with `one_epoch` until the text ends for the first time.

        Also writes the token ids [n] of the rows if asked to.
        """
        n = 0
        for tokens, keep in self.batches(len(next(iter(buffer.values()))), one_epoch=one_epoch):
            rows = slice(n, n + int(keep.sum()))
            for site, x in self.forward(tokens, keep).items():
                buffer[site][rows] = x
            if ids is not None:
                ids[rows] = tokens.input_ids[keep].to(ids.device)
            n = rows.stop
        return n

    def batches(self, capacity: int, *, one_epoch: bool = False) -> Iterator[tuple[Tokens, Tensor]]:
        """The contexts of the next forward passes and which of their tokens count [B, S], as many as fit into
        `capacity` rows; with `one_epoch` until the text ends for the first time.
        """
        n = barren = 0
        while sum(map(len, self.stream.peek())) <= capacity - n and not (one_epoch and self.stream.state.epoch):
            tokens = self.stream.take()
            keep = counted_tokens(self.model, tokens, special_tokens=not self.exclude_special)
            yield tokens, keep
            rows = int(keep.sum())
            n += rows
            barren = 0 if rows else barren + 1
            if barren > GROUP_DOCUMENTS and n == 0:
                raise UserError(f"the text {self.stream.source.name!r} has nothing but special tokens")

    def forward(self, tokens: Tokens, keep: Tensor) -> dict[Site, Tensor]:
        """Activations [n, width] of the n tokens that count, by site."""
        run = self.model.run(tokens.to(self.model.device), capture=self.sites, need_logits=False)
        run.check_finite()
        counted = keep.to(self.model.device)
        return {site: x[counted] for site, x in run.activations.items()}
