"""Which prompts align, and which of their tokens a mean may be taken over.

1. Template keys: prompts with equal key have equal length and align position by position.
2. `PositionGroups`: which tokens of different prompts are averaged together, so that a mean over them means something.

   - By template: (template, position).
   - By span, where prompts have named spans: (template, span, the span before it, position in the span). The template
     is the `template` field of the file. Positions are counted from the end of the span, where most of a word's tokens
     have been read, in the first span of a prompt from its beginning. Prompts of different lengths so share their
     means; a span longer than all in the reference takes the farthest known position for the tokens beyond.
   - Pooled: one group for all tokens of all prompts. What all prompts share at a position (the determiner, the first
     token) is then taken away along with what tells them apart, so the model without any node is no longer the model on
     another prompt but a broken one, and faithfulness says little. It is offered for comparison, never the default.

Shapes: B prompts, S positions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from sae.model.language_model import Tokens


def length_keys(clean: Tokens) -> list[str]:
    """The token length of each prompt."""
    return [str(length) for length in clean.lengths.tolist()]


def mask_keys(clean: Tokens, patch: Tokens) -> list[str]:
    """The commonest pattern each prompt fits: token ids with `*` where clean and patch differ, "1 * * 418 329"."""
    words = words_of(clean)
    patterns = [
        " ".join(a if a == b else "*" for a, b in zip(row, other, strict=True))
        for row, other in zip(words, words_of(patch), strict=True)
    ]
    return [key or "" for key in commonest_fits(words, Counter(patterns))]


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


def span_keys(templates: Sequence[str], span_numbers: Tensor, spans: Sequence[str]) -> list[str]:
    """The template and spans of each prompt with their lengths in tokens: "template|other*2 subject*1 verb*1"."""
    keys = []
    for template, row in zip(templates, span_numbers.tolist(), strict=True):
        runs = [(spans[number], len(list(run))) for number, run in groupby(n for n in row if n >= 0)]
        keys.append(f"{template}|" + " ".join(f"{name}*{length}" for name, length in runs))
    return keys


def template_of(span_key: str) -> str:
    """The template a key of `span_keys` begins with."""
    return span_key.rpartition("|")[0]


def numbered(names: Sequence[Any]) -> Tensor:
    """[B] int64: equal names as equal numbers, from 0 in the order in which they occur."""
    number = {name: n for n, name in enumerate(dict.fromkeys(names))}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


# ------------------------------------------------------------------------------------------ groups of tokens

Group = tuple[Any, ...]
"""(template, position); by span (template, span, span before, position in the span); pooled ()."""


class _Prompts(Protocol):
    """A `PromptSet`, as far as groups need it."""

    @property
    def clean(self) -> Tokens: ...

    def group_keys(self, *, pooled: bool = False) -> list[list[Group]]: ...


class PositionGroups:
    """The groups of tokens of some reference prompts, numbered from 0."""

    def __init__(self, reference: _Prompts, *, pooled: bool = False) -> None:
        self.pooled = pooled
        self._number: dict[Group, int] = {}
        for keys in reference.group_keys(pooled=pooled):
            for key in keys:
                self._number.setdefault(key, len(self._number))

    def __len__(self) -> int:
        return len(self._number)

    def covers(self, prompts: _Prompts) -> Tensor:
        """[B] bool: whether every token of a prompt lies in a group of the reference."""
        return torch.tensor(
            [all(self._find(key) >= 0 for key in keys) for keys in prompts.group_keys(pooled=self.pooled)]
        )

    def of(self, prompts: _Prompts) -> Tensor:
        """[B, S] int64 the number of every token's group; -1 at padding and in groups the reference does not have."""
        n_positions = prompts.clean.n_positions
        rows = [[self._find(key) for key in keys] for keys in prompts.group_keys(pooled=self.pooled)]
        table = [[-1] * (n_positions - len(row)) + row for row in rows]
        return torch.tensor(table, device=prompts.clean.input_ids.device)

    def _find(self, key: Group) -> int:
        """Number of the group, or of the nearest known position of its span; -1 where there is none."""
        number = self._number.get(key, -1)
        while number < 0 and len(key) == 4 and key[3] > 0:
            key = (*key[:3], key[3] - 1)
            number = self._number.get(key, -1)
        return number


def span_groups(key: str, names: Sequence[str]) -> list[Group]:
    """The group of every token of a prompt with this template key, whose tokens lie in the spans `names`."""
    template, groups, before = template_of(key), [], ""
    for name, run in groupby(names):
        length = len(list(run))
        positions = range(length) if not before else range(length - 1, -1, -1)
        groups += [(template, name, before, position) for position in positions]
        before = name
    return groups
