"""Checkpoints of a training run: a folder with every tensor and one JSON file, complete or absent.

`checkpoints/step_00001200/{state.safetensors, state.json}` is written under a temporary name and renamed; the last two
are kept. Everything that training reads is in it or follows from it: weights, Adam's moments and step counts, the
learners' counters, the step, and the position in the text at which the present fill of the buffer began.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from sae.activations import StreamState
from sae.files import read_json, read_tensors, temporary_name, write_tensors

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
    final = folder / f"step_{checkpoint.step:08d}"
    temporary = temporary_name(final)
    temporary.mkdir()
    try:
        write_tensors(temporary / "state.safetensors", checkpoint.tensors)
        entries = {key: value for key, value in vars(checkpoint).items() if key not in ("tensors", "position")}
        entries = {"schema_version": 1, **entries, "position": asdict(checkpoint.position)}
        (temporary / "state.json").write_text(json.dumps(entries), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in _folders(folder)[:-KEPT]:
        shutil.rmtree(old.rename(temporary_name(old)), ignore_errors=True)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a run, or None."""
    folders = _folders(folder)
    if not folders:
        return None
    entries = read_json(folders[-1] / "state.json")
    del entries["schema_version"]
    state = StreamState.from_json(entries.pop("position"))
    return Checkpoint(**entries, position=state, tensors=read_tensors(folders[-1] / "state.safetensors"))


def remove(folder: Path) -> None:
    """Removes all checkpoints: first from sight, so that half of one is never found."""
    if folder.is_dir():
        shutil.rmtree(folder.rename(temporary_name(folder)), ignore_errors=True)


def tensors_of(
    name: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """State, weights and optimizer moments of one autoencoder, by name; the tensors themselves, not copies."""
    tensors = {f"{name}/state/{key}": tensor for key, tensor in state.items()}
    for key, weight in weights.items():
        tensors[f"{name}/weights/{key}"] = weight.detach()
        tensors |= {f"{name}/adam/{key}/{moment}": t for moment, t in optimizer.state.get(weight, {}).items()}
    return tensors


def make_moments(name: str, weights: Mapping[str, Tensor], optimizer: Optimizer, found: Mapping[str, Tensor]) -> None:
    """Gives the optimizer the moments of one autoencoder that `found` has under the names of `tensors_of`."""
    for key, weight in weights.items():
        prefix = f"{name}/adam/{key}/"
        moments = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
        optimizer.state[weight] = {moment: tensor.to(weight.device) for moment, tensor in moments.items()}


def _folders(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []
