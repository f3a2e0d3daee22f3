"""Text to token ids and back, with the padding on the left and the caller's tokenizer left as it is.

1. `Tokens` is a batch: ids and mask, so that the last column is the last token of every row.
2. `TextCoder` wraps a copy of a Hugging Face tokenizer: a batch from texts, the one token of an answer, and the text a
   token adds when it continues a sentence, whatever marks the tokenizer writes for a space.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sae.errors import UserError


@dataclass(frozen=True)
class Tokens:
    """A left-padded batch of B rows and S positions."""

    input_ids: Tensor
    """[B, S] int64 token ids; padding stands on the left."""
    attention_mask: Tensor
    """[B, S] int64, 1 at tokens and 0 at padding."""

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, rows: slice | Tensor | Sequence[int] | int) -> Tokens:
        """The rows of a slice, an index or a boolean mask; one integer gives a batch of one row."""
        index = slice(rows, rows + 1 or None) if isinstance(rows, int) else rows
        return Tokens(self.input_ids[index], self.attention_mask[index])

    def to(self, device: torch.device | str) -> Tokens:
        """The same batch on a device."""
        return Tokens(self.input_ids.to(device), self.attention_mask.to(device))

    def repeat(self, n: int) -> Tokens:
        """n copies one after the other, [n*B, S]: row r of copy c is at c*B + r."""
        return Tokens(self.input_ids.repeat(n, 1), self.attention_mask.repeat(n, 1))

    @property
    def lengths(self) -> Tensor:
        """[B] number of tokens of each row, padding not counted."""
        return self.attention_mask.sum(-1)

    @property
    def n_positions(self) -> int:
        """S, padding counted."""
        return self.input_ids.shape[1]

    @property
    def position_ids(self) -> Tensor:
        """[B, S] the position each token would have alone, so that padding shifts nothing."""
        return (self.attention_mask.cumsum(-1) - 1).clamp(min=0)

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence[int]], *, pad_id: int = 0) -> Tokens:
        """Pad rows of ids on the left to the longest one."""
        if not rows:
            raise UserError("no texts to tokenize: give at least one")
        width = max(len(row) for row in rows)
        empty = next((index for index, row in enumerate(rows) if not row), None)
        if empty is not None:
            raise UserError(f"text {empty} has no tokens: give texts of at least one token")
        ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.int64)
        return cls(ids, mask)


class TextCoder:
    """Texts to `Tokens`, ids to readable strings; works on a copy of the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.special_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)
        self.pad_id: int = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), 0
        )
        self._readable: dict[int, str] = {}
        self._anchor = self._find_anchor()

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        """Token ids with the special tokens the tokenizer itself adds, cut to `max_length` tokens a text."""
        if isinstance(texts, str):
            texts = [texts]
        if not texts:
            raise UserError("no texts to tokenize: give at least one")
        limit = {} if max_length is None else {"truncation": True, "max_length": max_length}
        return Tokens.from_rows(self.tokenizer(list(texts), verbose=False, **limit)["input_ids"], pad_id=self.pad_id)

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """First character and the one after the last of every token of `encode`; (0, 0) for special tokens."""
        if not self.tokenizer.is_fast:
            raise UserError("this tokenizer does not know where in the text its tokens are: use a fast one for spans")
        return self.tokenizer(list(texts), verbose=False, return_offsets_mapping=True)["offset_mapping"]

    def single_token(self, text: str) -> int | None:
        """The id of `text` when it is exactly one known token after other text, else None."""
        alone = self._ids(text)
        if text[:1].isspace() and self._anchor is not None:
            before, after = self._ids(self._anchor), self._ids(self._anchor + text)
            if after[: len(before)] == before:
                alone = after[len(before) :]
        if len(alone) != 1 or alone[0] == self.tokenizer.unk_token_id:
            return None
        return alone[0]

    def strings(self, ids: Iterable[int] | Tensor) -> list[str]:
        """The text each token adds to a sentence, " he" and not "Ġhe"; special tokens by their name."""
        return [self._string(int(i)) for i in (ids.flatten().tolist() if isinstance(ids, Tensor) else ids)]

    def _string(self, token: int) -> str:
        if token not in self._readable:
            self._readable[token] = self._read(token)
        return self._readable[token]

    def _read(self, token: int) -> str:
        raw = self.tokenizer.convert_ids_to_tokens(token)
        if raw is None:
            return f"<{token}>"
        if token in self.special_ids or self._anchor is None:
            return raw
        before = self._ids(self._anchor)
        start, text = self._decode(before), self._decode([*before, token])
        piece = text[len(start) :] if text.startswith(start) else self._decode([token])
        readable = piece.isspace() or (piece.isprintable() and "\ufffd" not in piece)
        return piece if piece and readable else raw

    def _find_anchor(self) -> str | None:
        """A short text that survives a round trip: what follows it is read and written as a continuation."""
        for text in ("a", "the", "A", "I", "he", *sorted(self.tokenizer.get_vocab(), key=len)[:200]):
            ids = self._ids(text)
            if ids and self.tokenizer.unk_token_id not in ids and self._decode(ids).strip() == text.strip() != "":
                return text
        return None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
