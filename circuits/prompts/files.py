"""Rows of a prompt file: JSON lines, JSON, a table (CSV), or a data set of the hub, each with where it stands."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sae._files import MAX_TEXT_BYTES, parse_json, read_text, shorten
from sae._hub import hub_data_set
from sae.errors import UserError, near_paths

Row = Mapping[str, Any]

_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+(:[\w.-]+){0,2}$")
_TABLES = (".csv", ".tsv")
FORMAT_KEYS = {
    "clean_prefix", "patch_prefix", "clean_answer", "patch_answer", "corrupted", "correct_idx", "incorrect_idx",
    "corrupt", "answers", "wrong_answers", "context",
}  # fmt: skip
"""Keys any of which tells that an object is a prompt; MIB's rows are known by `*_counterfactual`."""


def file_rows(source: str | Path, *, hub: bool = True, folders: bool = False) -> Iterator[tuple[Row, str]]:
    """Every row of a file, or with `hub` of a data set there, or with `folders` of one in a folder, `FOLDER:split`; and
    where it stands. `UserError` where malformed.
    """
    path = Path(source)
    if folders and Path(str(source).partition(":")[0]).is_dir():
        return _hub_rows(str(source))
    if path.is_dir():
        raise UserError(f"{path} is a folder, not a prompt file")
    if path.exists():
        return _rows_of_file(path)
    if hub and _HUB_ID.match(str(source)) and path.suffix not in (".json", ".jsonl", *_TABLES):
        return _hub_rows(str(source))
    raise UserError(
        f"no prompt file {str(source)!r}: give a .jsonl, .json or .csv file"
        f"{', or a hub data set owner/name' if hub else ''}{near_paths(path)}"
    )


def is_row(content: Row) -> bool:
    """Whether an object has a key of a prompt."""
    return bool(FORMAT_KEYS & set(content)) or any(key.endswith("_counterfactual") for key in content)


def _rows_of_file(path: Path) -> Iterator[tuple[Row, str]]:
    text = (_zstd_text(path) if path.suffix == ".zst" else read_text(path)).removeprefix("\ufeff")  # a byte order mark
    if path.with_suffix("" if path.suffix == ".zst" else path.suffix).suffix in _TABLES:
        return _table_rows(text, path)
    first_line = next((line for line in text.split("\n") if line.strip()), "")
    if path.suffix == ".jsonl" or _is_json_object(first_line):
        return _json_line_rows(text, path)
    return _rows_of_object(_parse(text, path), str(path)) if text.strip() else iter(())


def _zstd_text(path: Path) -> str:
    """The text of a file that zstd has compressed, such as the tables of sae-probes."""
    import pyarrow

    try:
        with pyarrow.input_stream(str(path), compression="zstd") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} as zstd: {str(error).strip()}") from None
    if len(data) > MAX_TEXT_BYTES:
        raise UserError(f"{str(path)!r} has more than {MAX_TEXT_BYTES / 2**20:,.0f} MiB of text: split it")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(_parse(line, ""), dict)
    except UserError:
        return False


def _table_rows(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    csv.field_size_limit(2**31 - 1)
    top = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=lambda mark: len(FORMAT_KEYS & {name.strip('" \r') for name in top.split(mark)}))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        for fields in reader:
            where = f"{path}, line {reader.line_num}"
            if fields and len(fields) != len(header):
                raise UserError(
                    f"{where}: {len(fields)} fields, and the header has {len(header)}: put text with "
                    f"{delimiter!r} in double quotes"
                )
            if fields:
                yield dict(zip(header, fields, strict=True)), where
    except csv.Error as error:
        raise UserError(
            f'{path}, line {reader.line_num}: malformed table ({error}): a quote inside quotes is written ""'
        ) from None


def _json_line_rows(text: str, path: Path) -> Iterator[tuple[Row, str]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines also cuts at U+2028 inside a string
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _parse(line, where)
        if isinstance(row, dict) and not is_row(row) and all(isinstance(v, dict | list) for v in row.values()):
            yield from _rows_of_object(row, where)  # a whole JSON file on one line
        else:
            yield _check_row(row, where), where


def _parse(text: str, where: str | Path) -> Any:
    """JSON; half of a surrogate pair ("\\ud800" alone) is no character, and no tokenizer takes it."""
    value = parse_json(text, where)
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            around = error.object[max(0, error.start - 30) : error.end + 10]
            raise UserError(f"{where}: half of a surrogate pair, which is no character, in {around!r}") from None
    return value


def _rows_of_object(content: Any, where: str) -> Iterator[tuple[Row, str]]:
    """The rows of a JSON value: a list of rows, `{"prompts": rows}`, `{name: row}` (clusters), or one row."""
    if isinstance(content, dict) and isinstance(content.get("prompts"), list):
        words = content.get("word_idxs")
        content = content["prompts"]
        if isinstance(words, dict) and all(type(index) is int for index in words.values()):
            named = {name: {"tokens": [index, index + 1], "special": False} for name, index in words.items()}
            content = [{"spans": named, **row} if isinstance(row, dict) else row for row in content]
    if isinstance(content, list):
        for index, row in enumerate(content):
            yield _check_row(row, f"{where}, entry {index}"), f"{where}, entry {index}"
    elif isinstance(content, dict) and is_row(content):
        yield content, where
    elif isinstance(content, dict):
        for key, row in content.items():
            yield _check_row(row, f"{where}, entry {key!r:.60}"), f"{where}, entry {key!r:.60}"
    else:
        raise UserError(f"{where}: expected an object or a list of objects, found {shorten(repr(content))}")


def _hub_rows(source: str) -> Iterator[tuple[Row, str]]:
    name, *config = source.split(":")
    split = config.pop() if config else "train"
    try:
        data = hub_data_set(name, *config, split=split)
    except Exception as error:  # the datasets library raises many kinds
        reason = str(error).strip().splitlines()
        raise UserError(
            f"cannot read {source!r} from the hub: {reason[0] if reason else type(error).__name__}"
        ) from error
    for index, row in enumerate(data):
        yield row, f"{source}, row {index}"


def _check_row(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object with the keys of a prompt, found {shorten(repr(row))}")
    return row
