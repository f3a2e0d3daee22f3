"""Prompt data sets of every format in use, read into one record each.

1. **Pairs** (feature-circuits, Marks et al. 2024): JSON lines `{"clean_prefix", "patch_prefix", "clean_answer",
   "patch_answer", "case"}`, optionally `"template"`; without `patch_*` they are clean prompts alone.
2. **Clusters** (feature-circuits): JSON `{context_id: {"context": [token strings], "answer": str}}`.
3. **EAP-IG tables**: CSV `clean,corrupted,correct_idx,incorrect_idx[,label]`; the answers are token ids.
4. **Greater-than** (EAP-IG, MIB): CSV or rows `clean,corrupted` with the `label` (two digits) or the `year` (four) that
   the second year must exceed. Right are all two-digit years above it, wrong all others, so that the logit difference
   is theirs: the mean logit of the right years minus that of the wrong ones.
5. **Answer sets** (AutoCircuit): JSON `{"prompts": [{"clean", "corrupt", "answers": [...], "wrong_answers": [...]}]}`.
6. **Conversations**: JSON lines `{"messages": [{"role", "content"}], "patch_messages", "clean_answer", "patch_answer",
   "case"}`, which the model's chat template turns into text (`circuits.prompts.reader`).
7. **MIB rows** (`mib-bench/*` on the hub): `{"prompt", "*_counterfactual": {...}}` with the answer of each as a number
   or letter among `choices` (`answerKey`; multiple choice and ARC), as a `label` (arithmetic), or as the names of
   `metadata` (IOI: the indirect object is right, the subject wrong). A row without a counterfactual prompt counts as an
   empty prompt.

Answers are text or token ids. Rows of every format may name token spans under `"spans"` (see `circuits.prompts.spans`;
JSON text in a table); AutoCircuit's `word_idxs` are spans of one token. A template with fields, as MIB's rows have,
finds spans as well.

The format is recognised by its keys, so a row of any of them may come from JSON lines, JSON, CSV or a data set of the
hub (`owner/name`, `owner/name:split` or `owner/name:config:split`). Each format is a dataclass that checks its rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator

from circuits.prompts.files import Row, file_rows
from circuits.prompts.spans import Spans, parse_spans
from sae._files import check_type, parse_json, shorten
from sae.errors import UserError

_PREFERRED_COUNTERFACTUALS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")
_N_YEARS = 100


@dataclass(frozen=True)
class Example:
    """One prompt, or minimal pair of prompts, as text."""

    clean: str
    """The prompt in which the behaviour shows."""
    clean_answers: tuple[str | int, ...]
    """Right answers after it: text that continues the prompt, or token ids."""
    patch: str | None = None
    """The contrasting prompt, if there is one."""
    patch_answers: tuple[str | int, ...] = ()
    """Right answers after the contrasting prompt."""
    case: str = ""
    """Which kind of example it is, such as `plural_singular`; results are split by it."""
    template: str = ""
    """Name of the sentence frame it was made from: examples that share one align position by position. A frame with
    fields, `The {subject} near the {attractor}`, says where spans are.
    """
    spans: Spans = field(default_factory=dict)
    """Where named token spans are in both prompts, see `circuits.prompts.spans`."""
    messages: tuple[Any, ...] = ()
    """The clean prompt as a conversation, `{"role", "content"}` each, in place of its text."""
    patch_messages: tuple[Any, ...] = ()
    """The contrasting prompt as a conversation."""


def read_examples(source: str | Path) -> list[Example]:
    """Every example of a file, or of a data set on the hub, in order. Raises `UserError` with file and line."""
    examples = [_to_example(row, where) for row, where in file_rows(source)]
    if not examples:
        raise UserError(f"{source} holds no prompts")
    return examples


def read_rows(
    source: str | Path, text_keys: Sequence[str], *, data_sets: bool = False
) -> Iterator[tuple[Row, Example, str]]:
    """Rows of any file with a text, which need no answers: the row, its text with spans and template, and its place.

    data_sets: whether `source` may also be a folder with a data set (`FOLDER:split`), or one of the hub.
    """
    return rows_with_text(file_rows(source, hub=data_sets, folders=data_sets), text_keys)


def rows_with_text(rows: Iterable[tuple[Row, str]], text_keys: Sequence[str]) -> Iterator[tuple[Row, Example, str]]:
    """Read rows that are there already as `read_rows` reads a file."""
    for row, where in rows:
        key = next((key for key in text_keys if row.get(key)), None)
        if key is None:
            raise UserError(f"{where}: no text (found {sorted(row)}), expected one of {', '.join(text_keys)}")
        entry = check_type({"text": row[key], "template": row.get("template")}, _Text, f"{where}, {key}")
        yield row, _with_spans(Example(entry.text, (), template=entry.template), row, where), where


# ------------------------------------------------------------------------------------------ values


def _as_answers(value: Any) -> tuple[str | int, ...]:
    answers = tuple(value) if isinstance(value, list) else (value,)
    if not answers or not all(isinstance(answer, str) or type(answer) is int for answer in answers):
        raise ValueError("text, a token id or a list of these")
    return answers


def _as_ids(value: Any) -> tuple[int, ...]:
    try:
        ids = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        ids = None
    ids = tuple(ids) if isinstance(ids, list) else (ids,)
    if not ids or not all(type(token) is int for token in ids):
        raise ValueError("a token id or a list of them")
    return ids


def _as_label(value: Any) -> str:
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError("text")
    return "" if value is None else str(value)


def _as_two_digits(value: Any) -> int:
    """52 from "52", 4 from "4" and "04"; the last two digits of a year of four."""
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,2}|[0-9]{4}", text):
        raise ValueError("two digits, or a year of four; EAP-IG's other tables have correct_idx")
    return int(text[-2:])


def _as_context(value: Any) -> str:
    tokens = [value] if isinstance(value, str) else value
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("text or a list of texts")
    return "".join(tokens)


def _as_choices(value: Any) -> list[str]:
    choices = value["label"] if isinstance(value, dict) and "label" in value else value
    if not isinstance(choices, list) or not all(isinstance(choice, str | int) for choice in choices):
        raise ValueError('a list of texts, or {"label": [...]}')
    return [str(choice) for choice in choices]


def _as_messages(value: Any) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise ValueError('a list of messages, {"role": "user", "content": "..."} each')
    for message in value:
        if set(message) != {"role", "content"} or not all(isinstance(text, str) for text in message.values()):
            raise ValueError(
                f'{shorten(json.dumps(message))} among them: a message is {{"role": TEXT, "content": TEXT}}'
            )
    return tuple(value)


Answers = Annotated[Any, AfterValidator(_as_answers)]
Messages = Annotated[Any, AfterValidator(_as_messages)]
TokenIds = Annotated[Any, AfterValidator(_as_ids)]
Label = Annotated[Any, AfterValidator(_as_label)]
TwoDigits = Annotated[Any, AfterValidator(_as_two_digits)]
Context = Annotated[Any, AfterValidator(_as_context)]


# ------------------------------------------------------------------------------------------ formats


@dataclass(frozen=True)
class _Text:
    text: str
    template: Label = ""


FIELDS = {
    "clean_prefix": "clean", "context": "clean", "clean_answer": "clean_answers", "answer": "clean_answers",
    "answers": "clean_answers", "correct_idx": "clean_answers", "patch_prefix": "patch", "corrupted": "patch",
    "corrupt": "patch", "patch_answer": "patch_answers", "wrong_answers": "patch_answers",
    "incorrect_idx": "patch_answers", "label": "case",
}  # fmt: skip
"""What the keys of formats are called in an `Example`, where they have another name there."""


class _Format:
    """A format whose keys are fields of an `Example` under other names."""

    def example(self) -> Example:
        return Example(**{FIELDS.get(name, name): value for name, value in vars(self).items()})


@dataclass(frozen=True)
class _Clean(_Format):
    """A prompt of feature-circuits without its contrast."""

    clean_prefix: str
    clean_answer: Answers
    patch_answer: Answers = ()
    case: Label = ""
    template: Label = ""


@dataclass(frozen=True)
class _Pair(_Format):
    """A minimal pair of feature-circuits."""

    clean_prefix: str
    clean_answer: Answers
    patch_prefix: str
    patch_answer: Answers
    case: Label = ""
    template: Label = ""


@dataclass(frozen=True)
class _Chat:
    """A prompt, or a minimal pair, that is a conversation."""

    messages: Messages
    clean_answer: Answers
    patch_messages: Messages = ()
    patch_answer: Answers = ()
    case: Label = ""
    template: Label = ""

    def example(self) -> Example:
        return Example(
            "", self.clean_answer, "" if self.patch_messages else None, self.patch_answer, self.case, self.template,
            messages=self.messages, patch_messages=self.patch_messages,
        )  # fmt: skip


@dataclass(frozen=True)
class _Cluster(_Format):
    context: Context
    answer: Answers
    case: Label = ""


@dataclass(frozen=True)
class _Ids(_Format):
    """A row of EAP-IG."""

    clean: str
    corrupted: str
    correct_idx: TokenIds
    incorrect_idx: TokenIds
    label: Label = ""
    template: Label = ""


@dataclass(frozen=True)
class _GreaterThan:
    """A row of EAP-IG's or MIB's greater-than; the two digits to say are cut off where the prompts end in them."""

    clean: str
    corrupted: str
    label: TwoDigits
    template: Label = ""

    def example(self) -> Example:
        years = [f"{year:02}" for year in range(_N_YEARS)]
        end_in_year = all(re.search(r"(?<![0-9])[0-9]{4}$", text) for text in (self.clean, self.corrupted))
        clean, patch = (text[:-2] if end_in_year else text for text in (self.clean, self.corrupted))
        return Example(
            clean=clean,
            clean_answers=tuple(years[self.label + 1 :]),
            patch=patch,
            patch_answers=tuple(years[: self.label + 1]),
            template=self.template,
        )


@dataclass(frozen=True)
class _AnswerSets(_Format):
    """A prompt of AutoCircuit."""

    clean: str
    corrupt: str
    answers: Answers
    wrong_answers: Annotated[Any, AfterValidator(lambda value: _as_answers(value) if value else ())] = ()
    case: Label = ""
    template: Label = ""


@dataclass(frozen=True)
class _MibPrompt:
    """A prompt of MIB, or one of its counterfactuals."""

    prompt: str
    choices: Annotated[Any, AfterValidator(lambda value: None if value is None else _as_choices(value))] = None
    answerKey: Any = None
    label: Label = ""
    template: Label = ""
    letters: bool = False
    metadata: Any = None

    def answers(self, where: str, *, name: str = "") -> tuple[str, ...]:
        """The answer after the prompt; name: what of `metadata` it is, where nothing else says it."""
        if self.answerKey is None and self.label:
            return (self.label,)
        if self.answerKey is None and isinstance(named := (self.metadata or {}).get(name), str):
            return (f" {named}",)
        names, key = self.choices or [], self.answerKey
        if self.letters and key in names:
            return (str(key),)
        number = int(key) if isinstance(key, str) and key.isdecimal() and len(key) < 10 else key
        if type(number) is not int or not 0 <= number < len(names):
            allowed = f"the number of one of the {len(names)} choices" if names else "choices, and the number of one"
            raise UserError(f"{where}: key 'answerKey' is {shorten(json.dumps(key))}: expected {allowed}")
        choice = names[number]
        return (choice if self.letters or choice.startswith(" ") else f" {choice}",)


def _mib(row: Row, where: str) -> Example:
    columns = [key for key, value in row.items() if key.endswith("_counterfactual") and isinstance(value, dict)]
    if not columns:
        raise UserError(f"{where}: every counterfactual prompt is empty")
    column = next((key for key in _PREFERRED_COUNTERFACTUALS if key in columns), columns[0])
    clean = _mib_prompt(row, where)
    answers = clean.answers(where, name="indirect_object")
    if row[column].get("prompt") is None:
        return Example(clean.prompt, answers, "", template=clean.template)
    patch = _mib_prompt({"metadata": clean.metadata, **row[column]}, f"{where}, {column}")
    wrong = patch.answers(f"{where}, {column}", name="subject")
    return Example(clean.prompt, answers, patch.prompt, wrong, template=clean.template)


def _mib_prompt(row: Row, where: str) -> _MibPrompt:
    """Multiple choice has letters as its answers, under `choices.label`."""
    return check_type({**row, "letters": isinstance(row.get("choices"), dict)}, _MibPrompt, where)


def _schema(row: Row) -> Any:
    """The format of a row by its keys; None where it has none of them."""
    keys = set(row)
    if "messages" in keys:
        return _Chat
    if keys & {"clean_prefix", "patch_prefix", "clean_answer", "patch_answer"}:
        return _Pair if "patch_prefix" in keys else _Clean
    if keys & {"correct_idx", "incorrect_idx"}:
        return _Ids
    if "corrupted" in keys:
        return _GreaterThan if keys & {"label", "year"} else _Ids
    if keys & {"corrupt", "answers", "wrong_answers"}:
        return _AnswerSets
    return _Cluster if "context" in keys else None


def _to_example(row: Row, where: str) -> Example:
    schema = _schema(row)
    if schema is None and any(key.endswith("_counterfactual") for key in row):
        return _with_spans(_mib(row, where), row, where)
    if schema is None:
        raise UserError(
            f"{where}: no known prompt format has the keys {shorten(str(sorted(row)))}; the common one is "
            "clean_prefix, patch_prefix, clean_answer, patch_answer"
        )
    if schema is _GreaterThan and "year" in row:
        row = {**row, "label": row["year"]}
    return _with_spans(check_type(dict(row), schema, where).example(), row, where)


def _with_spans(example: Example, row: Row, where: str) -> Example:
    """The example with the spans its row names."""
    given = row.get("spans")
    if isinstance(given, str):
        given = parse_json(given, f"{where}, spans") if given.strip() else None
    return replace(example, spans=parse_spans(given, where)) if given else example
