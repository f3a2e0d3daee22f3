"""Template keys: prompts with equal key have equal length and align position by position.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from sae.model.language_model import Tokens


def length_keys(clean: Tokens) -> list[str]:
    """The token length of each prompt."""
    return [str(length) for length in clean.lengths.tolist()]


def mask_keys(clean: Tokens, patch: Tokens) -> list[str]:
    """The commonest pattern each prompt fits: token ids with `*` where clean and patch differ, "1 * * 418 329"."""
    words = words_of(clean)
    own = [
        " ".join(a if a == b else "*" for a, b in zip(row, other, strict=True))
        for row, other in zip(words, words_of(patch), strict=True)
    ]
    return [key or "" for key in commonest_fits(words, Counter(own))]


def words_of(tokens: Tokens) -> list[list[str]]:
    """The ids of each row as text, without padding."""
    rows = zip(tokens.input_ids.tolist(), tokens.attention_mask.tolist(), strict=True)
    return [[str(token) for token, real in zip(ids, mask, strict=True) if real] for ids, mask in rows]


def commonest_fits(rows: list[list[str]], patterns: Counter[str]) -> list[str | None]:
    """For each row the commonest pattern of its length that agrees with it wherever it is not `*`; None without one."""
    by_length: dict[int, list[tuple[str, list[str]]]] = {}
    for pattern, _ in patterns.most_common():
        words = pattern.split()
        by_length.setdefault(len(words), []).append((pattern, words))
    return [
        next(
            (
                pattern
                for pattern, words in by_length.get(len(row), [])
                if all(word in ("*", token) for word, token in zip(words, row, strict=True))
            ),
            None,
        )
        for row in rows
    ]


def span_keys(frames: Sequence[str], roles: Tensor, spans: Sequence[str]) -> list[str]:
    """Frame and the spans of each prompt with their lengths in tokens: "frame|other*2 subject*1 verb*1"."""
    keys = []
    for frame, row in zip(frames, roles.tolist(), strict=True):
        runs = [(spans[number], len(list(run))) for number, run in groupby(n for n in row if n >= 0)]
        keys.append(f"{frame}|" + " ".join(f"{name}*{length}" for name, length in runs))
    return keys


def frame_of(span_key: str) -> str:
    """The frame a key of `span_keys` begins with."""
    return span_key.rpartition("|")[0]
