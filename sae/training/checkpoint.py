"""Checkpoints of a training run: a folder with every tensor and one JSON file, complete or absent.

`checkpoints/step_00001200/{state.safetensors, state.json}` is written under a temporary name and renamed; the last two
stay, and where the last one is damaged the one before serves. Everything that training reads is in it or follows from
it: weights, Adam's moments and step counts, counters, the step, and the position in the text at which the present fill
of the buffer began. Where several processes train, each writes the tensors that it has to a file of its own,
`state-2-of-8.safetensors`; any number of processes goes on from all of them. A tensor that several of these files have
is divided over them by rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from sae._files import (
    digest_tensors,
    make_folder,
    read_json,
    read_tensors,
    sync,
    temporary_name,
    write_json,
    write_tensors,
)
from sae._run.contents import CHECKPOINTS, check_contents
from sae._run.processes import Processes
from sae.data.activations import StreamState
from sae.errors import UserError

log = logging.getLogger(__name__)

N_CHECKPOINTS = 2
"""Checkpoints that stay; the one before the last serves where that is damaged."""


@dataclass(frozen=True)
class Checkpoint:
    """A training run between two steps."""

    step: int
    """Steps done."""
    counters: Mapping[str, int]
    """Other whole numbers of the run: fills of the buffer and batches taken from it, or tokens read."""
    position: StreamState
    """Where in the text a resumed run begins to read."""
    log_bytes: int
    """Size of the training log."""
    tensors: Mapping[str, Tensor]
    """Weights, optimizer moments and counters by name."""


@dataclass(frozen=True)
class _Entries:
    """The contents of `state.json`."""

    schema_version: Literal[2]
    step: int
    counters: dict[str, int]
    position: StreamState
    log_bytes: int
    checksum: str
    """Digest of the tensors and of the other entries."""
    files: int = 1
    """Files of tensors, one of each process."""


def save(folder: Path, checkpoint: Checkpoint, processes: Processes | None = None) -> Path:
    """Writes a checkpoint and removes all but the last two; each of `processes` its tensors, the first all else."""
    processes = processes or Processes()
    final = folder / f"step_{checkpoint.step:08d}"
    temporary = processes.by_first(lambda: _temporary_folder(final))
    try:
        write_tensors(temporary / _tensor_file(processes.rank, processes.size), checkpoint.tensors)
        digests = processes.gathered(digest_tensors(checkpoint.tensors))
        if processes.is_first:
            _complete(temporary, final, checkpoint, digests)
    finally:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
    return final


def _temporary_folder(final: Path) -> Path:
    make_folder(final.parent)
    temporary = temporary_name(final)
    temporary.mkdir()
    return temporary


def _tensor_file(rank: int, size: int) -> str:
    return "state.safetensors" if size == 1 else f"state-{rank + 1}-of-{size}.safetensors"


def _complete(temporary: Path, final: Path, checkpoint: Checkpoint, digests: Sequence[str]) -> None:
    """Says what the tensors are of, and gives the folder its name."""
    entries = {key: value for key, value in vars(checkpoint).items() if key not in ("tensors", "position")}
    entries = {"schema_version": 2, **entries, "position": asdict(checkpoint.position)}
    entries |= {} if len(digests) == 1 else {"files": len(digests)}
    write_json(temporary / "state.json", {**entries, "checksum": _checksum(entries, digests)})
    if final.exists():  # damaged, so that training went on from an earlier one
        shutil.rmtree(final.rename(temporary_name(final)), ignore_errors=True)
    temporary.rename(final)
    sync(final.parent)
    for old in _folders(final.parent)[:-N_CHECKPOINTS]:
        shutil.rmtree(old.rename(temporary_name(old)), ignore_errors=True)


def latest(folder: Path) -> Checkpoint | None:
    """The last checkpoint of a run that is not damaged, or None where there is none at all."""
    folders = _folders(folder)
    for path in reversed(folders):
        try:
            return _read(path)
        except UserError as error:
            log.warning("a damaged checkpoint is left out: %s", error)
            reason = error
    if folders:
        raise UserError(f"no checkpoint in {str(folder)!r} can be read ({reason}): start again with --overwrite")
    return None


def tensors_of(
    name: str, weights: Mapping[str, Tensor], state: Mapping[str, Tensor], optimizer: Optimizer
) -> dict[str, Tensor]:
    """State, weights and optimizer moments of one autoencoder, by name; the tensors themselves, not copies."""
    tensors = {f"{name}/state/{key}": tensor for key, tensor in state.items()}
    for key, weight in weights.items():
        tensors[f"{name}/weights/{key}"] = weight.detach()
        tensors |= {f"{name}/adam/{key}/{moment}": t for moment, t in optimizer.state.get(weight, {}).items()}
    return tensors


def make_moments(name: str, weights: Mapping[str, Tensor], optimizer: Optimizer, saved: Mapping[str, Tensor]) -> None:
    """Gives the optimizer the moments of one autoencoder that `saved` has under the names of `tensors_of`."""
    for key, weight in weights.items():
        prefix = f"{name}/adam/{key}/"
        moments = {n.removeprefix(prefix): t for n, t in saved.items() if n.startswith(prefix)}
        optimizer.state[weight] = {moment: tensor.to(weight.device) for moment, tensor in moments.items()}


def put_in_force(tensors: Mapping[str, Tensor], checkpoint: Checkpoint, folder: Path) -> None:
    """Copies the tensors of a checkpoint into those of a run; UserError for any that is missing or of another shape."""
    for name, tensor in tensors.items():
        saved = checkpoint.tensors.get(name)
        if saved is None or saved.shape != tensor.shape:
            raise UserError(
                f"the checkpoint in {str(folder)!r} has nothing that fits {name.partition('/state/')[0]}: "
                "finish what was interrupted with the same options first"
            )
        tensor.copy_(saved)


def cut_log(path: Path, n_bytes: int) -> None:
    """Takes from a training log what was written after a checkpoint; a log that lost lines stays as it is."""
    if not path.is_file() or path.stat().st_size < n_bytes:
        log.warning("%s lost lines that were written before the checkpoint", path)
        return
    with path.open("r+b") as lines:
        lines.truncate(n_bytes)


def _read(path: Path) -> Checkpoint:
    check_contents(path, CHECKPOINTS.of(path) or CHECKPOINTS)
    noted = read_json(path / "state.json", _Entries)
    files = [read_tensors(path / _tensor_file(rank, noted.files)) for rank in range(noted.files)]
    entries = {key: value for key, value in asdict(noted).items() if key != "checksum"}
    if noted.files == 1:
        del entries["files"]
    if noted.checksum != _checksum(entries, [digest_tensors(tensors) for tensors in files]):
        raise UserError(f"{path} is damaged: its checksum is not that of its contents")
    return Checkpoint(noted.step, noted.counters, noted.position, noted.log_bytes, _joined(files))


def _joined(files: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files; one that is in several is divided by its rows."""
    blocks: dict[str, list[Tensor]] = {}
    for tensors in files:
        for name, tensor in tensors.items():
            blocks.setdefault(name, []).append(tensor)
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in blocks.items()}


def _checksum(entries: Mapping[str, Any], digests: Sequence[str]) -> str:
    text = json.dumps(entries, sort_keys=True) + "".join(digests)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _folders(folder: Path) -> list[Path]:
    """Checkpoints by step: folders of that name with a `state.json` in them."""
    return [path for path in sorted(folder.glob("step_*")) if CHECKPOINTS.lists(path)] if folder.is_dir() else []
