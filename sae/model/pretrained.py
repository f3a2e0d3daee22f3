"""A model and its tokenizer from a folder or the hub, with one sentence for whatever is wrong with the files.

1. `config.json` is read before anything is built from it: sizes that no model has would take for ever.
2. Code that comes with a model is never run.
3. Every exception of the library becomes one sentence that names the folder; files that are pointers of Git LFS or end
   early are named.
4. A model some of whose weights are not in the files is refused: the library would make them up.
"""

from __future__ import annotations

import json
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sae._files import read_json, shorten
from sae._hub import hub_reachable
from sae.errors import UserError, near_paths

LFS_POINTER = b"version https://git-lfs"
MOST_MODULES = 10_000
"""Of layers, experts, heads: what a model builds one module or loops over for each."""
LARGEST_SIZE = 2**31
COUNTS = ("layers", "layer", "experts", "heads", "head", "blocks")
HEADER_BYTES = 8


def pretrained_model(name: str, dtype: torch.dtype | None) -> nn.Module:
    """The model by folder or hub name in a number type, as stored where it is None. `UserError` where it cannot be
    loaded whole.
    """
    if Path(name).is_file():
        raise UserError(f"model {name!r} is a file: give the folder that holds config.json and the weights")
    local = Path(name).is_dir() or not hub_reachable()
    _check_config(Path(name) / "config.json")

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype or "auto", local_files_only=local, trust_remote_code=False, output_loading_info=True,
            ignore_mismatched_sizes=True,
        )  # fmt: skip
    except Exception as error:
        raise _not_loaded("model", name, "config.json and the weights", error) from error
    for what, key in (("has no weights for", "missing_keys"), ("has weights of another shape for", "mismatched_keys")):
        if names := sorted(_named(entry) for entry in info.get(key) or ()):
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"model {name!r} {what} {names[0]}{more}: they would be random; download it again, or mend config.json"
            )
    return model


def _named(entry: Any) -> str:
    """A weight, with its shape in the files and the one that config.json asks for where these differ."""
    if isinstance(entry, str):
        return entry
    name, *shapes = entry
    return f"{name} ({' and not '.join(str(list(shape)) for shape in shapes)})"


def pretrained_tokenizer(name: str, *, required: bool) -> Any:
    """The tokenizer by folder or hub name; None where there is none and none is required."""
    folder = Path(name)
    local = folder.is_dir() or not hub_reachable()

    try:
        try:
            return AutoTokenizer.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        except Exception:  # the many ways a folder's files can be odd; a bare tokenizer.json still serves
            if not (folder / "tokenizer.json").is_file():
                raise
            return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    except Exception as error:
        if required:
            raise _not_loaded("tokenizer of model", name, "tokenizer.json", error) from error
        return None


def _not_loaded(what: str, name: str, contents: str, error: Exception) -> UserError:
    """The sentence for whatever the library raised; raise what this returns."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, UnpicklingError):
        lines = ["a .bin file holds more than tensors, and is not opened: it could run code"]
    if "custom code" in str(error):
        lines = ["its config.json names code of its own (auto_map), which is never run"]
    reason = shorten(" ".join([type(error).__name__, *lines[:2]]) if lines else type(error).__name__, 300)
    if Path(name).is_dir():
        return UserError(
            f"{what} {name!r} cannot be loaded: the folder needs {contents} ({_damaged(Path(name)) or reason})"
        )
    return UserError(
        f"unknown {what} {name!r}: there is no such folder, and the Hugging Face hub did not give it (not connected, "
        f"or a wrong or private name); give a local folder that holds {contents}, or a name on the hub"
        f"{near_paths(name, folders=True)}"
    )


def _check_config(path: Path) -> None:
    """Raise UserError for a config.json that is no object, or has a size or a count that no model has."""
    if not path.is_file():
        return
    config = read_json(path)
    for key, value in _numbers(config):
        name = key.rpartition(".")[2]
        if not name.endswith("_id") and isinstance(value, int) and abs(value) > LARGEST_SIZE:
            raise UserError(f"{path}: {key} is {shorten(str(value))}: at most {LARGEST_SIZE} is allowed")
        if name.endswith(COUNTS) and value > MOST_MODULES:
            raise UserError(f"{path}: {key} is {shorten(str(value))}: at most {MOST_MODULES} is allowed")


def _numbers(value: Any, key: str = "") -> list[tuple[str, int | float]]:
    """Every number of nested objects with its key."""
    if isinstance(value, dict):
        return [entry for name, member in value.items() for entry in _numbers(member, f"{key}.{name}" if key else name)]
    return [(key, value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def _damaged(folder: Path) -> str:
    """The fault of the folder's files, if it can be told from their first bytes; else empty."""
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix not in (".safetensors", ".bin", ".json", ".model"):
            continue
        with path.open("rb") as file:
            head = file.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            return f"{path.name} is a pointer of Git LFS, not the file: run git lfs pull"
        if path.suffix == ".safetensors" and (short := _missing_bytes(path)):
            return f"{path.name} ends {short} bytes early: download it again"
    return ""


def _missing_bytes(path: Path) -> int:
    """How many bytes a safetensors file lacks by its own header; 0 where that cannot be told."""
    size = path.stat().st_size
    with path.open("rb") as file:
        n_header = int.from_bytes(file.read(HEADER_BYTES), "little")
        if n_header > size:
            return n_header + HEADER_BYTES - size if n_header < LARGEST_SIZE else 0
        try:
            header = json.loads(file.read(n_header))
            offsets = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            return max(0, HEADER_BYTES + n_header + max(offsets, default=0) - size)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
            return 0
