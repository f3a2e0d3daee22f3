"""Files that are either the old one or the new one, never half of each, and JSON whose mistakes have a place.

The twin of `sae/_files.py` for a package that knows nothing of torch: see there for what a schema is.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from graphs.errors import GraphError

MARK = "sparse-feature-circuits"
"""How files name the program that made them."""
MAX_TEXT_BYTES = 2**30
"""No file that is read at once as text is larger."""
HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
"""In JSON: what is a character only together with another one, as an escape or not."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with the same extension; rename it to `path` when the block succeeds.

    The file gets the permissions of any new file of this process and is on disk before it has its name.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.sfc.tmp{target.suffix}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    except OSError as error:
        raise GraphError(f"cannot write {str(target)!r} ({error.strerror or error}): give another place") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the disk take what was written to a file, or the names in a folder, before anything else happens."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def marked(content: bytes, kind: str) -> bytes:
    """A finished drawing or XML document with the mark by which the program knows its files again (`sae._run.outputs`).

    kind: its extension. The same bytes for the same content.
    """
    comment = f"Generator: {MARK}".encode()
    if kind == ".dot":
        return b"// " + comment + b"\n" + content
    if kind == ".pdf":
        return content.rstrip(b"\n") + b"\n%" + comment + b"\n"
    if kind == ".png":  # a chunk of text after the header, which ends at byte 33: length, name and contents, checksum
        chunk = b"tEXtSoftware\0" + MARK.encode()
        text = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        return content[:33] + text + content[33:]
    declaration, end, document = content.partition(b"?>")
    return declaration + end + b"\n<!-- " + comment + b" -->" + document


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; characters that are none (lone surrogates) as their escapes in JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as JSON in one line, atomically; a GraphError says what has no form in JSON, such as NaN."""
    try:
        text = json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GraphError(f"{path}: cannot be written as JSON ({error})") from None
    write_text(path, text + "\n")


def read_text(path: str | Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 file, or what comes through a pipe, of at most `limit` bytes; else a GraphError that names the path."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise GraphError(f"{path}: a {'folder' if stat.S_ISDIR(mode) else 'device'}, not a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise GraphError(f"{path}: more than {limit / 2**20:,.0f} MiB")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise GraphError(f"{path}: not a text file in UTF-8") from None
    except (OSError, ValueError) as error:
        if isinstance(error, GraphError):
            raise
        raise GraphError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None


def read_json(path: str | Path, schema: Any) -> Any:
    """Read a JSON file that fits `schema`; see `parse_json`."""
    return parse_json(read_text(path), path, schema)


def parse_json(text: str, where: str | Path, schema: Any) -> Any:
    """JSON text as the dictionaries and lists it spells, which fit `schema` (see `check_type`).

    What is not a finite number is None. A GraphError says where, and the line of malformed JSON.
    """
    undefined: list[str] = []

    def finite(number: str) -> float | None:
        if math.isfinite(value := float(number)):
            return value
        undefined.append(number)
        return None

    try:
        value = json.loads(text, parse_constant=undefined.append, parse_float=finite)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if "\n" in text.strip() else ""
        raise GraphError(f"{where}{line}: not valid JSON ({error.msg} at column {error.colno})") from None
    except RecursionError:
        raise GraphError(f"{where}: JSON nested too deeply to be read") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise GraphError(f"{where}: not valid JSON ({error})") from None
    as_read = not undefined and not HALF_A_CHARACTER.search(text)
    check_type(value, schema, where, text=text if as_read else None)
    return value


def check_type(value: Any, schema: Any, where: str | Path, *, text: str | None = None) -> None:
    """A GraphError with the key, its value and what is allowed unless the JSON value fits `schema`, a TypedDict or any
    type that pydantic knows. Types are strict: "3" is no number. Characters need not be valid Unicode.

    text: JSON that spells the value, where there is such; to write it takes as long as to check it.
    """
    try:
        if text is None:
            text = json.dumps(value, ensure_ascii=False).encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        _adapter(schema).validate_json(text, strict=True)
    except RecursionError:
        raise GraphError(f"{where}: JSON nested too deeply to be read") from None
    except (TypeError, ValueError) as error:
        wrong = first_mistake(error, value) if isinstance(error, ValidationError) else f"not plain JSON ({error})"
        raise GraphError(f"{where}: {wrong}") from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def first_mistake(error: ValidationError, value: Any) -> str:
    """`key 'nodes[0].effect' is "3": expected a valid number`, or which key is missing."""
    errors = error.errors(include_url=False, include_context=False)
    first = errors[0]
    if first["type"] == "json_invalid":  # what was written as JSON a moment ago can only be too deep
        return "JSON nested too deeply to be read"
    path = _path(first["loc"], value)
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    wanted = dict.fromkeys(other["msg"] for other in errors if _path(other["loc"], value) == path)
    allowed = " or ".join(msg.removeprefix("Value error, ").removeprefix("Input should be ") for msg in wanted)
    shown = json.dumps(first["input"], default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    key = f"key {key!r} is" if key else "found"
    return f"{key} {shown}: expected {allowed}"


def _path(loc: tuple[int | str, ...], value: Any) -> list[int | str]:
    """The parts of pydantic's location that are keys of the value or missing from it; others name types."""
    path: list[int | str] = []
    for part in loc:
        if isinstance(value, dict):
            path.append(part)
            value = value.get(part)
        elif isinstance(value, list) and isinstance(part, int):
            path.append(part)
            value = value[part] if part < len(value) else None
    return path
