"""Checkpoints of a training run: a folder with every tensor and one JSON file, complete or absent.

`checkpoints/step_00001200/{state.safetensors, state.json}` is written under a temporary name and renamed; the last two
are kept. Everything that training reads is in it or follows from it: weights, Adam's moments and step counts, the
learners' counters, the step, and the position in the text at which the present fill of the buffer began.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.activations import StreamState
from sae.files import read_json

KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A training run between two steps."""

    step: int
    """Steps done."""
    fill: int
    """Number of the present fill of the buffer."""
    dealt: int
    """Batches already taken from it."""
    position: StreamState
    """Where in the text that fill began."""
    log_bytes: int
    """Size of the training log."""
    tensors: Mapping[str, Tensor]
    """Weights, optimizer moments and counters by name."""


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Writes a checkpoint and removes all but the last two."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{secrets.token_hex(4)}.tmp"
    temporary.mkdir()
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in checkpoint.tensors.items()},
                  temporary / "state.safetensors")  # fmt: skip
        entries = {key: value for key, value in vars(checkpoint).items() if key not in ("tensors", "position")}
        entries = {"schema_version": 1, **entries, "position": asdict(checkpoint.position)}
        (temporary / "state.json").write_text(json.dumps(entries), encoding="utf-8")
        final = folder / f"step_{checkpoint.step:08d}"
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a run, or None."""
    folders = _folders(folder)
    if not folders:
        return None
    entries = read_json(folders[-1] / "state.json")
    del entries["schema_version"]
    position = entries.pop("position")
    pending = tuple(tuple(context) for context in position.pop("pending"))
    state = StreamState(**position | {"pending": pending, "rest": tuple(position["rest"])})
    return Checkpoint(**entries, position=state, tensors=load_file(folders[-1] / "state.safetensors"))


def remove(folder: Path) -> None:
    """Removes all checkpoints."""
    shutil.rmtree(folder, ignore_errors=True)


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []
