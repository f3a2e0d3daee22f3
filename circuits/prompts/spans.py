"""Named token spans, so that prompts of different lengths align.

The prompt file says where spans are, or a template finds them:

    "spans": {"subject": "secretary"}                       the words, which must occur once in each prompt
    "spans": {"subject": ["secretary", "secretaries"]}      in the clean prompt, and in the patch prompt
    "spans": {"verb": [5, 7]}                               tokens 5 and 6, counted from 0 with special tokens
    "spans": {"name": {"text": "Mary", "occurrence": 2}}    the second Mary; -1 is the last
    "spans": {"verb": {"tokens": [5, 7], "special": false}} the same without the special tokens in front
    "spans": {"name": {"chars": [4, 13]}}                   characters 4 to 12
    "The {subject} near the {attractor}"                    a template: the text of every field is a span

1. Words are looked for between word boundaries first, anywhere after that; they become ranges of characters, and these
   tokens: white space at the edge of a token counts for nothing, and a token of nothing else belongs to what follows.
2. Every token lies in one span: outside all that are named in `last` if it is the last token, else in `other`.
3. Spans are a property of the tokens of a prompt, so clean and patch prompt must have the same ones.

What cannot be found, overlaps or cuts a token is a `SpanProblem`, a reason to leave the prompt out.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from sae.errors import UserError

OTHER, LAST = "other", "last"
Range = tuple[int, int]


class SpanProblem(Exception):
    """Why the spans of a prompt cannot be used."""


@dataclass(frozen=True)
class Span:
    """The location of a span in one prompt: exactly one of text, chars and tokens is given."""

    text: str | None = None
    """Words of the prompt."""
    occurrence: int | None = None
    """Which of several occurrences of the words, from 1, or from the last, -1; None where they must occur once."""
    chars: Range | None = None
    """First character and the one after the last."""
    tokens: Range | None = None
    """First token and the one after the last."""
    special: bool = True
    """Whether tokens are counted with the special ones in front of the text."""


Spans = Mapping[str, tuple[Span, Span]]
"""Name -> where the span is in the clean and in the patch prompt."""


# ------------------------------------------------------------------------------------------ what a file says


def parse_spans(value: Any, where: str) -> dict[str, tuple[Span, Span]]:
    """The `spans` of one row of a prompt file; `UserError` with its place where it is malformed."""
    if not isinstance(value, Mapping):
        raise UserError(f'{where}: "spans" must be an object such as {{"subject": "secretary"}}, found {value!r:.60}')
    spans = {}
    for name, given in value.items():
        if given is None:  # a column of a hub data set that this row does not use
            continue
        if name == OTHER or not name.strip():
            raise UserError(f"{where}: a span cannot be called {name!r}: tokens outside all spans are called {OTHER!r}")
        if isinstance(given, list) and len(given) == 2 and not all(_is_number(end) for end in given):
            clean, patch = (_span(one, name, where) for one in given)
        else:
            clean = patch = _span(given, name, where)
        spans[str(name)] = (clean, patch)
    return spans


def _span(value: Any, name: str, where: str) -> Span:
    if isinstance(value, str) and value.strip():
        return Span(text=value.strip())
    if isinstance(value, list | tuple):
        return Span(tokens=_range(value, name, where))
    if isinstance(value, Mapping):
        special = value.get("special", True)
        if "tokens" in value and set(value) <= {"tokens", "special"} and isinstance(special, bool):
            return Span(tokens=_range(value["tokens"], name, where), special=special)
        if set(value) == {"chars"}:
            return Span(chars=_range(value["chars"], name, where))
        text, occurrence = value.get("text"), value.get("occurrence", 1)
        well_formed = set(value) <= {"text", "occurrence"} and _is_number(occurrence) and occurrence != 0
        if well_formed and isinstance(text, str) and text.strip():
            return Span(text=text.strip(), occurrence=occurrence)
    raise UserError(
        f'{where}: span {name!r} is {value!r:.60}; write its words, {{"text": words, "occurrence": 2}}, '
        '{"chars": [start, end]}, a range of tokens [start, end], or [clean, patch]'
    )


def _range(value: Any, name: str, where: str) -> Range:
    if not (isinstance(value, list | tuple) and len(value) == 2 and all(_is_number(end) for end in value)):
        raise UserError(f"{where}: span {name!r} is {value!r:.60}, expected a range [start, end]")
    if not 0 <= value[0] < value[1]:
        raise UserError(f"{where}: span {name!r} is {list(value)}: a range starts at 0 or later and ends behind it")
    return value[0], value[1]


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------ templates


def has_fields(template: str) -> bool:
    """Whether the text is a template that names spans, such as `The {subject} near the {attractor}`."""
    try:
        template_fields(template)
    except UserError:
        return False
    return True


@lru_cache(maxsize=4096)
def template_fields(template: str) -> tuple[tuple[bool, str], ...]:
    """The parts of a template in order: whether each is a field, and its text or name."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"span template {template!r} is malformed: {error}") from None
    names = [name for _, name, _, _ in parsed if name is not None]
    if not names or not all(names):
        raise UserError(f"span template {template!r} names no span: write The {{subject}} near the {{attractor}}")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or OTHER in names:
        why = f"names {twice!r} twice" if twice else f"uses the name {OTHER!r} of tokens outside all spans"
        raise UserError(f"span template {template!r} {why}: give the field another name")
    pieces = [part for text, name, _, _ in parsed for part in ((False, text), (True, name or ""))]
    return tuple((is_field, part) for is_field, part in pieces if part)


def spans_of_template(template: str, text: str) -> dict[str, Span]:
    """The text of every field of the template in a prompt that fits it in one way.

    A field is text that neither begins nor ends with white space. In how many ways the rest of the template fits from
    each character on is counted from its last part to its first, in time parts x characters.
    """
    pieces = template_fields(template)
    ways = [[0] * len(text) + [1]]  # ways[0] is of the rest from the present part on; 2 stands for several
    for is_field, part in reversed(pieces):
        ways.insert(0, _ways_of_field(ways[0], text) if is_field else _ways_of_literal(part, ways[0], text))
    if ways[0][0] == 0:
        raise SpanProblem("does not fit the span template")
    if ways[0][0] > 1:
        raise SpanProblem("fits the span template in more than one way")
    spans, start = {}, 0
    for (is_field, part), behind in zip(pieces, ways[1:], strict=True):
        end = start + len(part)
        if is_field:
            end = next(i for i in range(start + 1, len(text) + 1) if behind[i] and not text[i - 1].isspace())
            spans[part] = Span(chars=(start, end))
        start = end
    return spans


def _ways_of_field(behind: Sequence[int], text: str) -> list[int]:
    """In how many ways a field from each character on fits, with what is behind it."""
    ways, several = [0] * (len(text) + 1), 0
    for start in range(len(text) - 1, -1, -1):
        if not text[start].isspace():
            several = min(2, several + behind[start + 1])  # a field may end with this character
            ways[start] = several
    return ways


def _ways_of_literal(part: str, behind: Sequence[int], text: str) -> list[int]:
    """In how many ways the text of a template from each character on fits, with what is behind it."""
    ways = [0] * (len(text) + 1)
    start = text.find(part)
    while start >= 0:
        ways[start] = behind[start + len(part)]
        start = text.find(part, start + 1)
    return ways


# ------------------------------------------------------------------------------------------ tokens


def token_spans(spans: Mapping[str, Span], text: str, offsets: Sequence[Range]) -> list[str]:
    """The span of every token of a prompt, by name; offsets: characters of each token, (0, 0) for special ones."""
    names: list[str | None] = [None] * len(offsets)
    for name, span in spans.items():
        for token in _tokens(name, span, text, offsets):
            if names[token] is not None:
                raise SpanProblem(f"spans {names[token]!r} and {name!r} overlap")
            names[token] = name
    rest = [OTHER] * (len(offsets) - 1) + [OTHER if LAST in spans else LAST]
    return [name or other for name, other in zip(names, rest, strict=True)]


def _tokens(name: str, span: Span, text: str, offsets: Sequence[Range]) -> Sequence[int]:
    if span.tokens is not None:
        text_starts = next((token for token, (a, b) in enumerate(offsets) if a < b), 0)
        start, end = (bound + (0 if span.special else text_starts) for bound in span.tokens)
        if end > len(offsets):
            raise SpanProblem(f"span {name!r} ends behind the prompt")
        return range(start, end)
    start, end = span.chars or _find(name, span, text)
    if end > len(text):
        raise SpanProblem(f"span {name!r} ends behind the prompt")
    tokens = []
    for token, (a, b) in enumerate(offsets):
        piece = text[a:b]
        if piece.strip():
            a, b = a + len(piece) - len(piece.lstrip()), b - len(piece) + len(piece.rstrip())
        if piece and not piece.strip() and b == start:  # the space of a word that other words have in their first token
            tokens.append(token)
            continue
        if a == b or b <= start or a >= end:
            continue
        if a < start or b > end:
            raise SpanProblem(f"span {name!r} cuts a token")
        tokens.append(token)
    if not tokens:
        raise SpanProblem(f"span {name!r} holds no token")
    return tokens


def _find(name: str, span: Span, text: str) -> Range:
    """Characters of the words: between word boundaries if they stand there, anywhere else after that."""
    words = re.escape(span.text or "")
    matches = [match.span() for match in re.finditer(rf"(?<!\w){words}(?!\w)", text)]
    matches = matches or [match.span() for match in re.finditer(words, text)]
    if span.occurrence is None and len(matches) > 1:
        raise SpanProblem(f"span {name!r} occurs more than once: give its occurrence")
    number = 0 if span.occurrence is None else span.occurrence - (span.occurrence > 0)
    if not -len(matches) <= number < len(matches):
        raise SpanProblem(f"span {name!r} not found")
    return matches[number]


# ------------------------------------------------------------------------------------------ many prompts


def number_spans(rows: Sequence[Sequence[str]], n_positions: int) -> tuple[tuple[str, ...], Tensor]:
    """Number the spans of prompts in the order of the sentence.

    Args:
        rows: the span of every token of each prompt, by name.
        n_positions: length to which rows are padded on the left.

    Returns:
        The names, by the mean position of their first token (`other` in front, `last` behind), and the number of every
        token's name, [B, S] int64 with -1 at padding.
    """
    firsts: dict[str, list[float]] = {}
    for row in rows:
        for name in dict.fromkeys(row):
            firsts.setdefault(name, []).append(row.index(name) / len(row))
    rank = {name: sum(positions) / len(positions) for name, positions in firsts.items()}
    rank |= {name: value for name, value in ((OTHER, -1.0), (LAST, 2.0)) if name in rank}
    names = tuple(sorted(rank, key=lambda name: rank[name]))
    number = {name: index for index, name in enumerate(names)}
    table = [[-1] * (n_positions - len(row)) + [number[name] for name in row] for row in rows]
    return names, torch.tensor(table)
