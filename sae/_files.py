"""Reading and writing run files: a crash leaves the old file or the new one, and bad content is one sentence.

1. `atomic_write` writes to a temporary name in the same folder, syncs it to disk, gives it the permissions that the
   process gives any new file, and renames it.
2. `read_json` parses a file once by a schema (a dataclass, TypedDict or any type that pydantic knows) and says file,
   key, value and what is allowed where it does not fit. What is read is bounded, devices are refused.
3. `read_tensors` checks tensors by name, rank, shape and number type (`TensorSpec`).

torch and pydantic are imported where they are used: `sfc --help` needs neither.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import SafetensorError, safe_open

from sae.errors import UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from torch import Tensor

HALF_A_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]|[\ud800-\udfff]")
"""In JSON: what is a character only together with another one, as an escape or not."""
MAX_TEXT_BYTES = 2**30
"""No file that is read at once as text is larger."""
CHECKSUM = "checksum"
"""Where the header of a safetensors file has the digest of its tensors."""
_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{8}\.sfc\.tmp(\..+)?")


def temporary_name(path: Path) -> Path:
    """A new name beside `path` that says what is written there is not finished, and by which program."""
    return path.with_name(f".{path.stem}.{secrets.token_hex(4)}.sfc.tmp{path.suffix}")


def is_temporary(path: Path) -> bool:
    """Whether a file or folder has a name of `temporary_name`: what a killed process left."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporary(folder: Path) -> None:
    """Removes what a killed process was writing in a folder, not in those inside it."""
    for path in [path for path in folder.iterdir() if is_temporary(path)] if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # a folder that can only be read
                path.unlink(missing_ok=True)


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it to `path` when the block ends without an error.

    The file gets the permissions of any new file of this process and is on disk before it has its name. A disk that
    cannot take it is told in one sentence.
    """
    path = Path(path)
    make_folder(path.parent)
    temporary = temporary_name(path)
    try:
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)  # what the umask leaves; safetensors makes private files
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {str(path)!r}: {error}; what was written before is whole") from error
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


def without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity: they become None."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    metadata: Mapping[str, str] | None = None,
    checksum: bool = False,
) -> None:
    """Write tensors as safetensors, atomically; `metadata` goes into its header, with `checksum` a digest as well.

    The library makes a temporary file of its own beside the one it writes: it gets a folder for it.
    """
    from safetensors.torch import save_file

    path = Path(path)
    copies = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    memory = Counter(x.untyped_storage().data_ptr() for x in copies.values())  # safetensors writes none of it twice
    copies = {name: x.clone() if memory[x.untyped_storage().data_ptr()] > 1 else x for name, x in copies.items()}
    header = dict(metadata or {}) | ({CHECKSUM: digest_tensors(copies)} if checksum else {})
    with atomic_write(path) as temporary:
        folder = temporary_name(path.with_suffix(""))
        folder.mkdir()
        try:
            save_file(copies, folder / path.name, header or None)
            (folder / path.name).replace(temporary)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def digest_tensors(tensors: Mapping[str, Tensor]) -> str:
    """A hash of all bits of some tensors, their names, shapes and number types."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def read_header(path: str | Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file; empty where there is no such file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except FileNotFoundError:
        return {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is not a safetensors file, or not all of one: {error}") from None


def check_digest(path: str | Path) -> None:
    """Raises UserError for a safetensors file whose bits are not those that `write_tensors` took a checksum of."""
    if read_header(path).get(CHECKSUM) != digest_tensors(read_tensors(path)):
        raise UserError(f"{path} is damaged: its checksum is not that of its contents")


@dataclass(frozen=True)
class TensorSpec:
    """Requirements on a tensor in a file."""

    shape: tuple[int | str | None, ...]
    """Its sizes; a name stands for one number wherever it occurs, None for any."""
    kind: Literal["float", "int", "bool"] = "float"
    """Its number type, of any width."""
    finite: bool = True
    """Whether NaN and infinity are refused."""
    optional: bool = False
    """Whether it may be missing."""


def read_tensors(path: str | Path, expected: Mapping[str, TensorSpec] | None = None, **sizes: int) -> dict[str, Tensor]:
    """The tensors of a safetensors file, checked as in `check_tensors` where it is said what to expect.

    Raises UserError, naming the file, for one that is missing or damaged.
    """
    from safetensors.torch import load_file

    path = Path(path)
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise missing_file(path) from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise UserError(f"{path} is not a safetensors file, or not all of one: {error}") from None
    if expected is not None:
        check_tensors(tensors, expected, path, **sizes)
    return tensors


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, TensorSpec], where: str | Path, **sizes: int
) -> None:
    """Raises UserError, naming `where`, unless all expected tensors are there, as expected; others may be too.

    sizes: what names in `TensorSpec.shape` stand for; names without a size take that of the first tensor.
    """
    for name, spec in expected.items():
        if name not in tensors:
            if spec.optional:
                continue
            raise UserError(f"{where}: tensor {name!r} is missing (found {shorten(', '.join(sorted(tensors)))})")
        tensor = tensors[name]
        fits = tensor.ndim == len(spec.shape)
        for size, wanted in zip(tensor.shape, spec.shape, strict=False):
            wanted = sizes.setdefault(wanted, size) if isinstance(wanted, str) else wanted
            fits = fits and wanted in (None, size)
        if not fits:
            shape = ", ".join(str(sizes.get(n, n) if isinstance(n, str) else n or "any") for n in spec.shape)
            raise UserError(f"{where}: tensor {name!r} has shape {list(tensor.shape)}, expected [{shape}]")
        if _kind(tensor) != spec.kind:
            raise UserError(f"{where}: tensor {name!r} is {str(tensor.dtype)[6:]}, expected {spec.kind} numbers")
        if spec.finite and spec.kind == "float" and not tensor.isfinite().all():
            raise UserError(f"{where}: tensor {name!r} holds numbers that are not finite: it is damaged")


def _kind(tensor: Tensor) -> str:
    if str(tensor.dtype) == "torch.bool":
        return "bool"
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "int"


def missing_file(path: Path) -> UserError:
    """The error for a file that is not in its folder; raise what this returns."""
    return UserError(f"looked for {path.name} in {str(path.parent)!r}, found {names_in(path.parent)}")


def names_in(folder: Path) -> str:
    """The first ten names in a folder, for messages."""
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(path.name for path in folder.iterdir())[:10]) or "nothing"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, atomically; characters that are none (lone surrogates) as their escapes in JSON."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, obj: Any) -> None:
    """Write `obj` as indented JSON, atomically."""
    write_text(path, to_json(obj, indent=2) + "\n")


def to_json(obj: Any, *, indent: int | None = None) -> str:
    """`obj` as JSON text; undefined numbers are null, as JSON has none."""
    return json.dumps(without_nan(obj), indent=indent, ensure_ascii=False, allow_nan=False)


def read_text(path: str | Path, *, limit: int = MAX_TEXT_BYTES) -> str:
    """A UTF-8 file, or what comes through a pipe, of at most `limit` bytes; else one sentence that names the path."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode) or stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
            raise UserError(f"{str(path)!r} is a {'folder' if stat.S_ISDIR(mode) else 'device'}, not a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise UserError(f"{str(path)!r} has more than {limit / 2**20:,.0f} MiB: split it")
        return data.decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"no file {str(path)!r}: give the path of an existing file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"cannot read {str(path)!r}: {getattr(error, 'strerror', None) or error}") from None


def read_json(path: str | Path, schema: Any = dict[str, Any]) -> Any:
    """Read a JSON file as `schema` (by default any object); see `parse_json`."""
    return parse_json(read_text(path), path, schema)


def parse_json(text: str, where: str | Path, schema: Any = Any) -> Any:
    """JSON text as a value of the type `schema`: a dataclass, TypedDict, list[int], Any, ...

    Types are strict: "3" is no number. Raises UserError with `where` and the line of malformed JSON, or the key, its
    value and what is allowed.
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
        raise UserError(f"{where}{line}: malformed JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply to be read") from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise UserError(f"{where}: malformed JSON: {error}") from None
    if schema is Any:
        return value
    as_read = not undefined and not HALF_A_CHARACTER.search(text)
    return check_type(value, schema, where, text=text if as_read else None)


def check_type(value: Any, schema: Any, where: str | Path, *, text: str | None = None) -> Any:
    """A JSON value as a value of the type `schema`, as in `parse_json`; what is no Unicode becomes U+FFFD.

    text: JSON that spells the value, where there is such; to write it takes as long as to check it.
    """
    from pydantic import ValidationError

    try:
        if text is None:
            text = json.dumps(value, ensure_ascii=False, default=str)
            if not text.isascii():
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return _adapter(schema).validate_json(text, strict=True)
    except RecursionError:
        raise UserError(f"{where}: JSON nested too deeply to be read") from None
    except ValidationError as error:
        raise UserError(f"{where}: {first_mistake(error, value)}") from None


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

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
    name = f"key {key!r} is" if key else "found"
    return f"{name} {shorten(json.dumps(first['input'], default=str))}: expected {allowed}"


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


def shorten(text: str, limit: int = 80) -> str:
    """The text, or its beginning and "..."."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
