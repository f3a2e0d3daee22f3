"""Text to token ids and back, with the padding on the left and the caller's tokenizer left as it is.

1. `Tokens` is a batch: ids and mask, so that the last column is the last token of every row.
2. `TokenizerWrapper` wraps a copy of a Hugging Face tokenizer: a batch from texts, the tokens with which a text goes
   on, and the text a token adds when it continues a sentence, whatever marks the tokenizer writes for a space.
3. Texts have all special tokens that the tokenizer adds by itself, as the model saw them. Prompts go on: they have
   those in front, once, and none behind.
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


class TokenizerWrapper:
    """Texts to `Tokens`, ids to readable strings; works on a copy of the tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = copy.deepcopy(tokenizer)
        self.special_ids: frozenset[int] = frozenset(tokenizer.all_special_ids)
        self.pad_id: int = next(
            (i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), 0
        )
        self._readable: dict[int, str] = {}
        self._anchor = self._find_anchor()
        self.prefix: tuple[int, ...] = self._find_prefix()

    def encode(self, texts: Sequence[str], *, max_length: int | None = None) -> Tokens:
        """Token ids with the special tokens the tokenizer itself adds, cut to `max_length` tokens a text."""
        if isinstance(texts, str):
            texts = [texts]
        if not texts:
            raise UserError("no texts to tokenize: give at least one")
        limit = {} if max_length is None else {"truncation": True, "max_length": max_length}
        return Tokens.from_rows(self._call(texts, **limit)["input_ids"], pad_id=self.pad_id)

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of prompts: special tokens in front alone, and once where the text already has them."""
        first = list(self.prefix)
        return [ids if ids[: len(first)] == first else first + ids for ids in self.own_ids(texts)]

    def prompt_offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """First character and the one after the last of every token of `prompt_ids`; (0, 0) for the special ones in
        front.
        """
        if not self.tokenizer.is_fast:
            raise UserError("this tokenizer does not know where in the text its tokens are: use a fast one for spans")
        if not texts:
            return []
        encoded = self._call(texts, add_special_tokens=False, return_offsets_mapping=True)
        first, blank = list(self.prefix), [(0, 0)] * len(self.prefix)
        return [
            blank + (offsets[len(first) :] if ids[: len(first)] == first else offsets)
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def own_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts without the special tokens that the tokenizer adds by itself."""
        if not texts:
            return []
        backend: Any = getattr(self.tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "encode_batch_fast"):
            return self._call(texts, add_special_tokens=False)["input_ids"]
        backend.no_truncation()
        backend.no_padding()
        try:
            return [row.ids for row in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:
            raise _not_text(texts) from None

    def continuations(self, texts: Sequence[str], more: Sequence[str]) -> list[list[int] | None]:
        """The ids that `more` adds to each text, `own_ids(text + more)` minus `own_ids(text)`; None where what follows
        merges with the text's last token.
        """
        joined = [text + after for text, after in zip(texts, more, strict=True)]
        number = {text: index for index, text in enumerate(dict.fromkeys([*texts, *joined]))}
        ids = self.own_ids(list(number))
        pairs = [(ids[number[text]], ids[number[both]]) for text, both in zip(texts, joined, strict=True)]
        return [both[len(text_ids) :] if both[: len(text_ids)] == text_ids else None for text_ids, both in pairs]

    def spelling(self, previous: int, text: str) -> int | None:
        """The one token that writes `text` behind the token `previous`, also where the tokenizer would join the two."""
        names = [self.tokenizer.convert_tokens_to_ids(name) for name in (text, f"##{text}")]
        joined = self._decode([previous]) + text
        for token in [*self._ids(text)[-1:], *names]:
            if token not in (None, self.tokenizer.unk_token_id) and self._decode([previous, token]) == joined:
                return token
        return None

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
        anchor_ids = self._ids(self._anchor)
        start, text = self._decode(anchor_ids), self._decode([*anchor_ids, token])
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

    def _find_prefix(self) -> tuple[int, ...]:
        """The special tokens that the tokenizer itself puts in front of a text."""
        text = self._anchor or "a"
        plain, full = self._ids(text), self._call([text])["input_ids"][0]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return tuple(full[:start])
        return ()

    def _call(self, texts: Sequence[str], **options: Any) -> Any:
        try:
            return self.tokenizer(list(texts), verbose=False, **options)
        except TypeError:
            raise _not_text(texts) from None

    def _ids(self, text: str) -> list[int]:
        return self.own_ids([text])[0]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _not_text(texts: Sequence[str]) -> UserError:
    """The error for texts that a tokenizer does not take; raise what this returns."""
    for number, text in enumerate(texts):
        try:
            text.encode("utf-8")
        except (UnicodeEncodeError, AttributeError):
            return UserError(f"text {number} is no text that can be written as UTF-8: {text!r:.80}")
    return UserError("the tokenizer takes none of these texts: give strings")
