"""Files that are either the old one or the new one, never half of each, and JSON whose mistakes have a place.

The twin of `sae/files.py` for a package that knows nothing of torch: see there for what a schema is.
"""

from __future__ import annotations

import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from graphs.errors import GraphError

MAX_TEXT_BYTES = 2**30
"""No file that is read at once as text is larger."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` with the same extension; rename it to `path` when the block succeeds.

    The file gets the permissions of any new file of this process and is on disk before it has its name.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.tmp{target.suffix}")
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


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def read_json(path: str | Path, schema: Any = Any) -> Any:
    """Read a JSON file as `schema`; see `parse_json`."""
    return parse_json(read_text(path), path, schema)


def parse_json(text: str, where: str | Path, schema: Any = Any) -> Any:
    """JSON text as a value of the type `schema`; a GraphError says where, which key, its value and what is allowed."""
    try:
        value = json.loads(text)
        return value if schema is Any else _adapter(schema).validate_json(json.dumps(value), strict=True)
    except json.JSONDecodeError as error:
        raise GraphError(f"{where}, line {error.lineno}: not valid JSON ({error.msg})") from None
    except RecursionError:
        raise GraphError(f"{where}: JSON nested too deeply to be read") from None
    except ValidationError as error:
        raise GraphError(f"{where}: {_first_mistake(error)}") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise GraphError(f"{where}: not valid JSON ({error})") from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def _first_mistake(error: ValidationError) -> str:
    """`key 'a.b' is '3': expected a valid integer`, or which key is missing."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    wanted = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    shown = json.dumps(first["input"], default=str)
    shown = shown if len(shown) <= 80 else shown[:77] + "..."
    return f"key {key!r} is {shown}: {wanted}" if key else f"found {shown}: {wanted}"
