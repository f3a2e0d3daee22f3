"""Reading and writing run files, so that a crash leaves the old file or the new one and never half of one."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.errors import UserError

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.tmp(\..+)?")


def temporary_name(path: Path) -> Path:
    """A new name beside `path` that says what is written there is not finished."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has a name of `temporary_name`: what a killed process left."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporary(folder: Path) -> None:
    """Removes what a killed process was writing, in the folder and all inside it."""
    for path in [path for path in folder.rglob(".*") if is_temporary(path)]:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block ends without an error.

    A disk that cannot take the file is told in one sentence.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        yield temporary
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {str(path)!r}: {error}; what was written before is whole") from error
    finally:
        temporary.unlink(missing_ok=True)


def without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors as safetensors, atomically; `metadata` goes into its header."""
    with atomic_write(path) as temporary:
        header = None if metadata is None else dict(metadata)
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, temporary, header)


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; for a missing or damaged one a UserError that names it."""
    path = Path(path)
    try:
        return load_file(path)
    except FileNotFoundError:
        raise missing_file(path) from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or not all of one: {error}") from None


def missing_file(path: Path) -> UserError:
    """The error for a file that is not in its folder; raise what this returns."""
    there = path.parent
    found = ", ".join(sorted(p.name for p in there.iterdir())[:10]) if there.is_dir() else "no such folder"
    return UserError(f"looked for {path.name} in {str(there)!r}, found {found or 'nothing'}")


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically."""
    write_text(path, json.dumps(obj, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or malformed one raises UserError with the file and the line."""
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: give the path of an existing JSON file") from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: malformed JSON: {error.msg}") from None


def prepare_folder(path: str | Path, *, overwrite: bool) -> Path:
    """Make the folder; one that exists and holds something is refused unless `overwrite` (nothing is deleted)."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise UserError(f"output folder {str(path)!r} is a file: give another folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"output folder {str(path)!r} is not empty: give another folder or allow overwriting")
    make_folder(path)
    if not os.access(path, os.W_OK):
        raise UserError(f"output folder {str(path)!r} cannot be written to: give another folder")
    return path


def make_folder(path: str | Path) -> Path:
    """Make a folder, and those it is in, where there is none."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {str(path)!r} ({error.strerror}): give another one") from None
    return path
