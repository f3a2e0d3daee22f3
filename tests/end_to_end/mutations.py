"""Damaged copies of files: JSON with other keys, types and depths, tensors of other shapes, types and numbers, text and
bytes that are cut or changed. All from one random generator, so that a case is its seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 3, 2**31, 10**12, 2**63, 10**30, -(10**30), 0.5, 1e308, -1e308, float("nan"),
    float("inf"), "", "x", "3", "<b>", "\x1b[31m", "a\ud800b", "/etc/passwd", "../../x", "resid_0", [], {}, [1], [[]],
    ["x"], {"a": 1}, [None], [0.5, "x"], [1] * 50, "y" * 3000,
)  # fmt: skip
"""What an entry is replaced by."""
RAW = (
    "", "{", "[]", "null", "3", '"x"', "[" * 100_000, '{"a":' * 100_000, "9" * 5000, '{"a": ' + "9" * 5000 + "}",
    "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "\x00" * 40, "{}", "NaN",
)  # fmt: skip
"""What a whole text is replaced by."""


def mutate_file(path: Path, random: Random) -> str:
    """Damage one file in place by its kind; returns what was done."""
    whole_or_part = random.random()
    if whole_or_part < 0.12:
        return mutate_bytes(path, random)
    if path.suffix in (".json", ".jsonl") and 0 < path.stat().st_size < 2**20:
        return mutate_json(path, random)
    if path.suffix == ".safetensors":
        return mutate_tensors(path, random)
    return mutate_bytes(path, random)


def mutate_bytes(path: Path, random: Random) -> str:
    """Cut the file, change some bytes, or replace all of it."""
    data = bytearray(path.read_bytes())
    kind = random.choice(("cut", "flip", "insert", "empty", "raw"))
    if kind == "cut":
        data = data[: random.randrange(len(data) + 1)]
    elif kind == "flip" and data:
        for _ in range(random.choice((1, 3, 20))):
            data[random.randrange(min(len(data), random.choice((64, len(data)))))] = random.randrange(256)
    elif kind == "insert":
        spot = random.randrange(len(data) + 1)
        data[spot:spot] = random.choice((b"\xff", b"\x00", b'"', b"}", b",", b"\xed\xa0\x80", b"\n\n", b"[["))
    elif kind == "empty":
        data = bytearray()
    else:
        data = bytearray(random.choice(RAW).encode())
    path.write_bytes(bytes(data))
    return f"bytes {kind}"


def mutate_json(path: Path, random: Random) -> str:
    """Change one entry of the JSON, or of one of its lines."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text("utf-8")]
    number = random.randrange(len(lines))
    value = json.loads(lines[number])
    value, what = mutate_value(value, random)
    lines[number] = json.dumps(value)
    path.write_text("\n".join(lines))
    return what


def mutate_value(value: Any, random: Random) -> tuple[Any, str]:
    """The JSON value with one entry, chosen at any depth, dropped, replaced, doubled or added to."""
    holders = [(holder, path) for holder, path in _holders(value, ())]
    if not holders or random.random() < 0.03:
        return random.choice(VALUES), "all"
    shallow = [entry for entry in holders if len(entry[1]) < 3]
    holder, path = random.choice(holders if random.random() < 0.4 else shallow)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    action = random.choice(("drop", "replace", "replace", "replace", "near", "double", "add", "deep"))
    if not keys or action == "add":
        new = random.choice(VALUES)
        holder.update({"extra": new}) if isinstance(holder, dict) else holder.append(new)
        return value, f"add {path}"
    key = random.choice(keys)
    if action == "drop":
        del holder[key]
    elif action == "double" and isinstance(holder, list):
        holder.append(holder[key])
    elif action == "deep":
        for _ in range(random.choice((1, 50, 300))):
            holder[key] = [holder[key]]
    elif action == "near":
        holder[key] = _near(holder[key], random)
    else:
        holder[key] = random.choice(VALUES)
    return value, f"{action} {(*path, key)}"


def _holders(value: Any, path: tuple):
    if isinstance(value, dict | list):
        yield value, path
        for key, item in list(value.items() if isinstance(value, dict) else enumerate(value))[:200]:
            yield from _holders(item, (*path, key))


def _near(value: Any, random: Random) -> Any:
    """A value of the same type that may not fit."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, value * 1000, 0))
    if isinstance(value, float):
        return random.choice((-value, value * 1e300, 0.0, value * 1e-300))
    if isinstance(value, str):
        return random.choice((value[:-1], value + "x", value.upper(), value * 2, " " + value))
    if isinstance(value, list):
        return random.choice((value[:-1], value * 2, value[::-1]))
    return value


def mutate_tensors(path: Path, random: Random) -> str:
    """Change, drop or add a tensor of a safetensors file; its header's metadata stay, or change as well."""
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = file.metadata()
    if not tensors or (about and random.random() < 0.15):
        key = random.choice(list(about or {"x": ""}))
        about = {**(about or {}), key: random.choice(("", "x", "resid_9", "{", "[" * 2000, "9" * 30, "a,b,c,d"))}
        save_file(tensors, path, about)
        return f"header {key}"
    name = random.choice(list(tensors))
    changes: tuple[Callable[[torch.Tensor], torch.Tensor | None], ...] = (
        lambda x: None,
        lambda x: x[None],
        lambda x: x.flatten(),
        lambda x: x.reshape(-1)[:1].reshape(()) if x.numel() else x[None],
        lambda x: x[:-1] if x.ndim else x[None],
        lambda x: torch.cat([x, x]) if x.ndim else x[None],
        lambda x: x.T.contiguous() if x.ndim == 2 else x[None],
        lambda x: x.double(),
        lambda x: x.half(),
        lambda x: x.to(torch.int64),
        lambda x: x.bool(),
        lambda x: x.to(torch.complex64),
        lambda x: torch.full_like(x, float("nan")) if x.is_floating_point() else torch.full_like(x, -1),
        lambda x: torch.full_like(x, float("inf")) if x.is_floating_point() else torch.full_like(x, 2**31 - 1),
        lambda x: x * 1e30 if x.is_floating_point() else x + 1,
        lambda x: x * 0,
        lambda x: -x if x.dtype is not torch.bool else ~x,
        lambda x: x.new_zeros(0),
        lambda x: x.new_full((1,), 10**9) if not x.is_floating_point() and x.dtype is torch.int64 else x[:0],
    )
    number = random.randrange(len(changes))
    try:
        changed = changes[number](tensors[name].clone())
    except (RuntimeError, IndexError):
        changed = None
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed.contiguous()
    save_file(tensors, path, about)
    return f"tensor {name} {number}"
