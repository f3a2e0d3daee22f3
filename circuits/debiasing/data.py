"""Texts with an intended and a spurious label, as prompts of a probe.

    {"text": "She works as a nurse", "intended": "nurse", "spurious": "female"}

1. Rows come from JSON lines, JSON, a table, a folder with a data set, or the hub (`LabHC/bias_in_bios:train`); the text
   is under one of `TEXT_KEYS`, spans and templates are read as those of prompts.
2. In the *ambiguous* texts every intended label comes with one spurious label, so that a probe trained on them may use
   either. Which go together is the pairing that most of the texts have; the others show which of the two it uses.
3. Groups (intended, spurious) are made equally large wherever a probe is trained, of the texts that the model can read.
4. A text that occurs several times is never both learned from and tested on.

Tokens have spans: those of the rows; else `other` and `last`, or for a probe that reads the mean of all tokens `text`,
every token but the special ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch

from circuits.debiasing.options import LAST, MEAN
from circuits.prompts.alignment import length_keys
from circuits.prompts.dataset import PromptSet
from circuits.prompts.formats import Example, read_rows, rows_with_text
from circuits.prompts.reader import by_kind, find_spans
from circuits.prompts.spans import OTHER, has_fields, number_spans
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.tokens import Tokens

TEXT_KEYS = ("text", "prompt", "hard_text", "clean_prefix", "clean")
"""Keys of the text; `hard_text` is that of Bias in Bios (LabHC/bias_in_bios)."""
WHOLE = "text"
"""Span of every token but the special ones."""
Source = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Labelled:
    """A text and its labels."""

    example: Example
    """The text with its spans."""
    intended: str
    """Label that the probe is to learn; empty where it is not given."""
    spurious: str
    """Label that it is not to use; empty where it is not given."""


def read_labelled(source: Source, *, intended: str | None, spurious: str | None) -> list[Labelled]:
    """Texts with the labels under these keys; None for a label that is not read."""
    rows = read_rows(source, TEXT_KEYS, data_sets=True) if isinstance(source, str | Path) else _given(source)
    texts = []
    for row, example, where in rows:
        values = []
        for key in (intended, spurious):
            value = "" if key is None else row.get(key)
            if value is None or (key is not None and str(value) == ""):
                raise UserError(f"{where}: no label {key!r} (found {sorted(row)}): say which key with --intended or "
                                "--spurious")  # fmt: skip
            values.append(str(value))
        texts.append(Labelled(example, *values))
    if not texts:
        raise UserError(f"{source} holds no texts")
    return texts


def _given(rows: Sequence[Mapping[str, Any]]) -> Iterable[tuple[Mapping[str, Any], Example, str]]:
    return rows_with_text(((row, f"text {number}") for number, row in enumerate(rows)), TEXT_KEYS)


# ------------------------------------------------------------------------------------------ which label goes with which


@dataclass(frozen=True)
class Pairing:
    """The two classes of each label, and which go together in the ambiguous texts."""

    classes: tuple[str, str]
    """Intended labels, sorted."""
    spurious: tuple[str, str]
    """The spurious label that comes with each."""

    @staticmethod
    def of(texts: Sequence[Labelled], pairs: str | None = None) -> Pairing:
        """The pairing that is given, `nurse=female,professor=male`, or that most of the texts have."""
        counts = Counter((text.intended, text.spurious) for text in texts)
        classes = sorted({one for one, _ in counts})
        others = sorted({other for _, other in counts})
        for what, names, option in (("intended", classes, "--classes"), ("spurious", others, "another key")):
            if len(names) != 2:
                shown = ", ".join(names[:8])
                raise UserError(f"the {what} label has {len(names)} values ({shown}): two are needed; take {option}")
        orders = [dict(zip(classes, order, strict=True)) for order in permutations(others)]
        if pairs is not None:
            given = dict(pair.strip().split("=", 1) for pair in pairs.split(",") if "=" in pair)
            if given not in orders:
                shown = " or ".join(",".join(f"{a}={b}" for a, b in order.items()) for order in orders)
                raise UserError(f"pairs is {pairs!r}: it must be {shown}")
            orders = [given]
        sizes = [sum(counts[pair] for pair in order.items()) for order in orders]
        same = [sum(a == b for a, b in order.items()) for order in orders]  # decides where groups are equally large
        best = max(range(len(orders)), key=lambda number: (round(sizes[number] / len(texts), 1), same[number]))
        return Pairing((classes[0], classes[1]), (orders[best][classes[0]], orders[best][classes[1]]))

    def agrees(self, text: Labelled) -> bool:
        """Whether a text's labels go together."""
        return self.spurious[self.classes.index(text.intended)] == text.spurious

    def group(self, text: Labelled) -> str:
        """The name of a text's group."""
        return f"{text.intended}_{text.spurious}"


def equal_groups(texts: Sequence[Labelled], pairing: Pairing, limit: int | None = None) -> list[Labelled]:
    """The first texts of each group, as many of each as the smallest has, `limit` at most, in their order."""
    size = Counter(map(pairing.group, texts))
    most = min([*size.values(), limit or min(size.values(), default=0)])
    return _first_of_each(texts, pairing, most)


def _first_of_each(texts: Sequence[Labelled], pairing: Pairing, most: int) -> list[Labelled]:
    taken: Counter[str] = Counter()
    chosen = []
    for text in texts:
        group = pairing.group(text)
        if taken[group] < most:
            chosen.append(text)
        taken[group] += 1
    return chosen


def divided(
    texts: Sequence[Labelled], pairing: Pairing, share: float, seed: int
) -> tuple[list[Labelled], list[Labelled]]:
    """Texts to learn on and texts to test on, `share` of each group, drawn at random."""
    test = held_out_rows(texts, list(map(pairing.group, texts)), share, torch.Generator().manual_seed(seed))
    return ([text for row, text in enumerate(texts) if row not in test],
            [text for row, text in enumerate(texts) if row in test])  # fmt: skip


def held_out_rows(
    texts: Sequence[Labelled], groups: Sequence[Any], share: float, generator: torch.Generator, *, least: int = 0
) -> set[int]:
    """The rows of the texts to test on: `share` of the different texts of each group, at least `least` of them, drawn
    at random, with all that repeat them in any group. Groups are drawn from in the order in which they occur.
    """
    by_group: dict[Any, dict[str, None]] = {}
    for text, group in zip(texts, groups, strict=True):
        by_group.setdefault(group, {})[text.example.clean] = None
    tested: set[str] = set()
    for of_group in by_group.values():
        names = list(of_group)
        order = torch.randperm(len(names), generator=generator).tolist()
        tested |= {names[number] for number in order[: max(least, round(share * len(names)))]}
    return {row for row, text in enumerate(texts) if text.example.clean in tested}


# ------------------------------------------------------------------------------------------ as prompts


@dataclass(frozen=True)
class TextSet:
    """B labelled texts as prompts."""

    prompts: PromptSet
    """Tokens and spans; cases are the groups."""
    intended: list[str]
    """[B]."""
    spurious: list[str]
    """[B]."""

    def __len__(self) -> int:
        return len(self.intended)

    @property
    def labelled(self) -> list[Labelled]:
        """The texts with their labels, without spans."""
        labels = zip(self.prompts.texts, self.intended, self.spurious, strict=True)
        return [Labelled(Example(text, ()), *both) for text, *both in labels]

    def first(self, n: int) -> TextSet:
        """At most n of the texts, of each group by its share."""
        rows = sorted(by_kind(self.prompts.cases)[:n])
        return TextSet(self.prompts[rows], [self.intended[row] for row in rows], [self.spurious[row] for row in rows])


def text_set(
    texts: Sequence[Labelled], model: LanguageModel, position: str, *, name: str, context: int | None = None
) -> TextSet:
    """The texts as one batch; those that do not fit in the model's context, or lack the probe's span, are left out.

    position: `last`, `mean`, or the span that the probe reads; context: tokens after which a text is cut.
    """
    spans = [row[:context] for row in _spans([text.example for text in texts], model, position)]
    rows = _usable_rows(spans, model, position)
    if not rows:
        raise UserError(f"none of the {len(texts)} texts {name} has {position!r} tokens that the model can read")
    fitting = [texts[row] for row in rows]
    pad = model.text_coder.pad_id
    ids = [row[:context] for row in model.text_coder.prompt_ids([text.example.clean for text in fitting])]
    clean = Tokens.from_rows(ids, pad_id=pad)
    names, numbers = number_spans([spans[row] for row in rows], clean.n_positions)
    prompts = PromptSet(
        clean=clean,
        patch=None,
        clean_answers=torch.full((len(fitting),), -1),
        patch_answers=None,
        cases=[f"{text.intended}_{text.spurious}".strip("_") for text in fitting],
        templates=length_keys(clean),
        texts=[text.example.clean for text in fitting],
        rejected={"too long, or without the span": len(texts) - len(fitting)} if len(fitting) < len(texts) else {},
        spans=names,
        span_numbers=numbers,
    )
    return TextSet(prompts.to(model.device), [text.intended for text in fitting], [text.spurious for text in fitting])


def usable(texts: Sequence[Labelled], model: LanguageModel, position: str) -> list[Labelled]:
    """The texts that `text_set` does not leave out."""
    return [
        texts[row] for row in _usable_rows(_spans([text.example for text in texts], model, position), model, position)
    ]


def _usable_rows(spans: Sequence[Sequence[str]], model: LanguageModel, position: str) -> list[int]:
    longest = model.max_positions or 10**9
    return [row for row, of_row in enumerate(spans) if 0 < len(of_row) <= longest and _has(of_row, position)]


def prompt_rows(texts: TextSet) -> list[dict[str, Any]]:
    """The texts as lines of a prompt file, spans as ranges of tokens; the answer, which probes do not read, is token 0.

    Raises UserError for a span in several pieces, which a line cannot say.
    """
    prompts, rows = texts.prompts, []
    assert prompts.span_numbers is not None
    first = prompts.clean.n_positions - prompts.clean.lengths
    for row, (text, case) in enumerate(zip(prompts.texts, prompts.cases, strict=True)):
        numbers = prompts.span_numbers[row, int(first[row]) :].tolist()
        spans = {}
        for number, name in enumerate(prompts.spans):
            tokens = [at for at, of_token in enumerate(numbers) if of_token == number]
            if name == OTHER or not tokens:
                continue
            if tokens != list(range(tokens[0], tokens[-1] + 1)):
                raise UserError(f"span {name!r} of {text!r:.60} is in several pieces")
            spans[name] = {"tokens": [tokens[0], tokens[-1] + 1]}
        rows.append({"clean_prefix": text, "clean_answer": 0, "case": case, "spans": spans})
    return rows


def span_read(position: str) -> str:
    """The span that a probe of this position reads."""
    return WHOLE if position == MEAN else position


def _has(spans: Sequence[str], position: str) -> bool:
    return position == LAST or span_read(position) in spans


def _spans(examples: Sequence[Example], model: LanguageModel, position: str) -> list[list[str]]:
    """The span of every token of each text; none for a text whose own spans cannot be found."""
    named = position not in (LAST, MEAN) or (
        position == LAST and all(example.spans or has_fields(example.template) for example in examples)
    )
    if named:
        return [[] if isinstance(spans, str) else spans for spans in find_spans(examples, model)]
    ids = model.text_coder.prompt_ids([example.clean for example in examples])
    if position == MEAN:
        return [["other" if token in model.special_ids else WHOLE for token in row] for row in ids]
    return [["other"] * (len(row) - 1) + [LAST] * bool(row) for row in ids]
