"""Prompt data sets of every format in use, read into one record each.

1. **Pairs** (feature-circuits, Marks et al. 2024): JSON lines `{"clean_prefix", "patch_prefix", "clean_answer",
   "patch_answer", "case"}`, optionally `"template"`; without `patch_*` they are clean prompts alone.
2. **Clusters** (feature-circuits): JSON `{context_id: {"context": [token strings], "answer": str}}`.
3. **EAP-IG and MIB tables**: CSV `clean,corrupted,correct_idx,incorrect_idx[,label]`; the answers are token ids.
4. **Answer sets** (AutoCircuit): JSON `{"prompts": [{"clean", "corrupt", "answers": [...], "wrong_answers": [...]}]}`.
5. **MIB rows** (`mib-bench/*` on the hub): `{"prompt", "choices", "answerKey", "*_counterfactual": {...}}`.

Rows of every format may name token spans under `"spans"` (see `circuits.spans`; JSON text in a table); AutoCircuit's
`word_idxs` are spans of one token. A template with fields, as MIB's rows have, finds spans as well.

The format is recognised by its keys, so a row of any of them may come from JSON lines, JSON, CSV or a data set of the
hub (`owner/name`, `owner/name:split` or `owner/name:config:split`).
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from circuits.spans import Spans, parse_spans
from sae.errors import UserError, near_paths
from sae.hub import hub_data_set

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+){0,2}$")
_PREFERRED_COUNTERFACTUALS = ("s2_io_flip_counterfactual", "symbol_counterfactual", "random_counterfactual")


@dataclass(frozen=True)
class Example:
    """One prompt, or minimal pair of prompts, as text."""

    clean: str
    """The prompt in which the behaviour shows."""
    clean_answers: tuple[str | int, ...]
    """What the model should say after it: text, or token ids."""
    patch: str | None = None
    """The contrasting prompt, if there is one."""
    patch_answers: tuple[str | int, ...] = ()
    """What the model should say after the contrasting prompt."""
    case: str = ""
    """Which kind of example it is, such as `plural_singular`; results are split by it."""
    template: str = ""
    """Name of the sentence frame it was made from: examples that share one align position by position. A frame with
    fields, `The {subject} near the {attractor}`, says where spans are.
    """
    spans: Spans = field(default_factory=dict)
    """Where named token spans are in both prompts, see `circuits.spans`."""


def read_examples(source: str | Path) -> list[Example]:
    """Every example of a file, or of a data set on the hub, in order. Raises `UserError` with file and line."""
    path = Path(source)
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a prompt file")
    if path.is_file():
        examples = [_to_example(row, where) for row, where in _file_rows(path)]
    elif _HUB_ID.match(str(source)) and path.suffix not in (".json", ".jsonl", ".csv"):
        examples = [_to_example(row, where) for row, where in _hub_rows(str(source))]
    else:
        raise UserError(
            f"no prompt file {str(source)!r}: give a .jsonl, .json or .csv file, or a hub data set owner/name"
            f"{near_paths(path)}"
        )
    if not examples:
        raise UserError(f"{source} holds no prompts")
    return examples


def read_rows(source: str | Path, text_keys: Sequence[str]) -> Iterator[tuple[Row, Example, str]]:
    """Rows of any file with a text, which need no answers: the row, its text with spans and template, and its place."""
    path = Path(source)
    if not path.is_file():
        raise UserError(f"no prompt file {str(source)!r}: give a .jsonl, .json or .csv file{near_paths(path)}")
    for row, where in _file_rows(path):
        key = next((key for key in text_keys if row.get(key)), None)
        if key is None:
            raise UserError(f"{where}: no text (found {sorted(row)}), expected one of {', '.join(text_keys)}")
        example = Example(clean=_text(row, key, where), clean_answers=(), template=str(row.get("template") or ""))
        yield row, _with_spans(example, row, where), where


# ------------------------------------------------------------------------------------------ rows of a file


def _file_rows(path: Path) -> Iterator[tuple[Row, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file: byte {error.start} is not UTF-8") from None
    if path.suffix == ".csv":
        return _csv_rows(text, path)
    first_line = next((line for line in text.splitlines() if line.strip()), "")
    if path.suffix == ".jsonl" or _is_json_object(first_line):
        return _json_line_rows(text, path)
    return _json_rows(text, path)


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except json.JSONDecodeError:
        return False


def _csv_rows(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    for row in reader:
        yield {key: value for key, value in row.items() if key is not None}, f"{path}, line {reader.line_num}"


def _json_line_rows(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also cuts at U+2028 inside a string
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error.msg} at column {error.colno}): {_shorten(line)!r}") from None
        if isinstance(row, dict) and not _is_row(row) and all(isinstance(v, dict | list) for v in row.values()):
            yield from _rows_of_object(row, where)  # a whole JSON file on one line
        else:
            yield _check_row(row, where), where


def _json_rows(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    if not text.strip():
        return
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    yield from _rows_of_object(content, str(path))


def _rows_of_object(content: Any, where: str) -> Iterator[tuple[Row, str]]:
    """The rows of a JSON value: a list of rows, `{"prompts": rows}`, `{name: row}` (clusters), or one row."""
    if isinstance(content, dict) and isinstance(content.get("prompts"), list):
        words = content.get("word_idxs")
        content = content["prompts"]
        if isinstance(words, dict):
            named = {name: {"tokens": [place, place + 1], "special": False} for name, place in words.items()}
            content = [{"spans": named, **row} if isinstance(row, dict) else row for row in content]
    if isinstance(content, list):
        for index, row in enumerate(content):
            yield _check_row(row, f"{where}, entry {index}"), f"{where}, entry {index}"
    elif isinstance(content, dict) and _is_row(content):
        yield content, where
    elif isinstance(content, dict):
        for key, row in content.items():
            yield _check_row(row, f"{where}, entry {key!r}"), f"{where}, entry {key!r}"
    else:
        raise UserError(f"{where}: expected an object or a list of objects, found {_shorten(json.dumps(content))}")


def _hub_rows(source: str) -> Iterator[tuple[Row, str]]:
    name, *parts = source.split(":")
    split = parts.pop() if parts else "train"
    try:
        data = hub_data_set(name, *parts, split=split)
    except Exception as error:  # the datasets library raises many kinds
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot read {source!r} from the hub: {reason[0] if reason else type(error).__name__}"
        ) from error
    for index, row in enumerate(data):
        yield row, f"{source}, row {index}"


# ------------------------------------------------------------------------------------------ row -> Example


def _pair(row: Row, where: str) -> Example:
    has_patch = "patch_prefix" in row
    return Example(
        clean=_text(row, "clean_prefix", where),
        clean_answers=_answers(row, "clean_answer", where),
        patch=_text(row, "patch_prefix", where) if has_patch else None,
        patch_answers=_answers(row, "patch_answer", where) if has_patch or "patch_answer" in row else (),
        case=str(row.get("case") or ""),
        template=str(row.get("template") or ""),
    )


def _cluster(row: Row, where: str) -> Example:
    context = _value(row, "context", where)
    text = "".join(str(token) for token in context) if isinstance(context, list) else str(context)
    return Example(clean=text, clean_answers=_answers(row, "answer", where), case=str(row.get("case") or ""))


def _eap(row: Row, where: str) -> Example:
    return Example(
        clean=_text(row, "clean", where),
        clean_answers=_token_ids(row, "correct_idx", where),
        patch=_text(row, "corrupted", where),
        patch_answers=_token_ids(row, "incorrect_idx", where),
        case=str(row.get("label") or ""),
    )


def _answer_sets(row: Row, where: str) -> Example:
    return Example(
        clean=_text(row, "clean", where),
        clean_answers=_answers(row, "answers", where),
        patch=_text(row, "corrupt", where),
        patch_answers=_answers(row, "wrong_answers", where) if row.get("wrong_answers") else (),
        case=str(row.get("case") or ""),
    )


def _mib(row: Row, where: str) -> Example:
    columns = [key for key, value in row.items() if key.endswith("_counterfactual") and isinstance(value, Mapping)]
    if not columns:
        raise UserError(f"{where}: every counterfactual prompt is empty")
    counterfactual = row[next((key for key in _PREFERRED_COUNTERFACTUALS if key in columns), columns[0])]
    return Example(
        clean=_text(row, "prompt", where),
        clean_answers=_mib_answer(row, where),
        patch=_text(counterfactual, "prompt", where),
        patch_answers=_mib_answer(counterfactual, where),
        template=str(row.get("template") or ""),
    )


def _mib_answer(row: Row, where: str) -> tuple[str | int, ...]:
    if "answerKey" not in row:
        return (str(_value(row, "label", where)),)
    choices, key = _value(row, "choices", where), row["answerKey"]
    if isinstance(choices, Mapping):  # multiple choice: the letters are the answers
        labels = list(choices["label"])
        return (str(key if key in labels else labels[int(key)]),)
    choice = str(choices[int(key)])
    return (choice if choice.startswith(" ") else f" {choice}",)


_FORMATS: tuple[tuple[frozenset[str], Callable[[Row, str], Example]], ...] = (
    (frozenset({"clean_prefix", "patch_prefix", "clean_answer", "patch_answer"}), _pair),
    (frozenset({"corrupted", "correct_idx", "incorrect_idx"}), _eap),
    (frozenset({"corrupt", "answers", "wrong_answers"}), _answer_sets),
    (frozenset({"context"}), _cluster),
)
"""Keys any of which gives a format away, and the reader of its rows; MIB rows are known by `*_counterfactual`."""


def _is_row(content: Row) -> bool:
    known = set().union(*(keys for keys, _ in _FORMATS))
    return bool(known & set(content)) or any(key.endswith("_counterfactual") for key in content)


def _to_example(row: Row, where: str) -> Example:
    for keys, reader in _FORMATS:
        if keys & set(row):
            return _with_spans(reader(row, where), row, where)
    if any(key.endswith("_counterfactual") for key in row):
        return _with_spans(_mib(row, where), row, where)
    raise UserError(
        f"{where}: no known prompt format has the keys {sorted(row)}; the common one is clean_prefix, patch_prefix, "
        "clean_answer, patch_answer"
    )


def _with_spans(example: Example, row: Row, where: str) -> Example:
    """The example with the spans its row names."""
    given = row.get("spans")
    if isinstance(given, str) and given.strip():
        try:
            given = json.loads(given)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: spans are not JSON ({error.msg}): {_shorten(str(given))!r}") from None
    return replace(example, spans=parse_spans(given, where)) if given else example


# ------------------------------------------------------------------------------------------ single values


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the keys of a prompt, found {_shorten(json.dumps(row))}")
    return row


def _value(row: Row, key: str, where: str) -> Any:
    if row.get(key) is None:
        raise UserError(f"{where}: missing key {key!r} (found {sorted(row)})")
    return row[key]


def _text(row: Row, key: str, where: str) -> str:
    value = _value(row, key, where)
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} must be text, found {_shorten(json.dumps(value))}")
    return value


def _answers(row: Row, key: str, where: str) -> tuple[str | int, ...]:
    value = _value(row, key, where)
    answers = tuple(value) if isinstance(value, list) else (value,)
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f"{where}: {key!r} must be text or a list of texts, found {_shorten(json.dumps(value))}")
    return answers


def _token_ids(row: Row, key: str, where: str) -> tuple[str | int, ...]:
    value = _value(row, key, where)
    try:
        ids = json.loads(value) if isinstance(value, str) else value
        return tuple(int(token) for token in (ids if isinstance(ids, list) else [ids]))
    except (ValueError, TypeError):
        raise UserError(f"{where}: {key!r} must be a token id or a list of them, found {value!r}") from None


def _shorten(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[:length] + "…"
