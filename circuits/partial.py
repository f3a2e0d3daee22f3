"""What of a discovery is finished, so that an interrupted one goes on after its last finished batch.

1. `partial.json` says what the work is: model, autoencoders, prompts, options. The files of other work are refused
   with a sentence that says what differs.
2. Every finished batch of a pass is a safetensors file, `nodes-0003` or `edges-0003`, which appears under its name
   only once it is whole; a kill at any moment costs the batch that was running.
3. Tensors are read back by memory-mapping: what a pass leaves on disk takes memory only where it is used.
4. When the circuit is written, `remove_partial` takes the files away.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from circuits.prompts import PromptSet
from sae.autoencoder import SparseAutoencoder, fingerprint
from sae.errors import UserError
from sae.files import atomic_write, read_json, write_json
from sae.model import LanguageModel, Tokens
from sae.sites import Site

WORK_FILE = "partial.json"
FOLDER = "partial"
SCHEMA_VERSION = 1


class PartialFiles:
    """The finished batches of one discovery in a folder of their own."""

    def __init__(self, folder: str | Path, work: Mapping[str, Any], *, resume: bool) -> None:
        """work: what `work_of` says; resume: go on with the files of the same work instead of starting anew."""
        self.folder = Path(folder)
        known = self.folder / WORK_FILE
        if resume and known.is_file():
            self._check(read_json(known), dict(work))
            return
        remove_partial(self.folder)
        write_json(known, {"schema_version": SCHEMA_VERSION, **work})

    def _check(self, known: dict[str, Any], work: dict[str, Any]) -> None:
        if known.pop("schema_version", None) != SCHEMA_VERSION:
            raise UserError(f"{self.folder / WORK_FILE} is of another version: start again with --overwrite")
        before, now = _flat(known), _flat(work)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"the interrupted discovery in {str(self.folder)!r} had {name} {before.get(name)!r}, not "
                    f"{now.get(name)!r}: resume with the same, or start again with --overwrite"
                )

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished batch; None where it is not finished."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): start again with --overwrite") from None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a finished batch."""
        with atomic_write(self.folder / f"{name}.safetensors") as temporary:
            save_file({key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}, temporary)


def remove_partial(folder: str | Path) -> None:
    """Take the files away, once what they hold is saved."""
    shutil.rmtree(folder, ignore_errors=True)


def interrupted(folder: str | Path) -> bool:
    """Whether a folder holds the files of a discovery that did not end."""
    return (Path(folder) / WORK_FILE).is_file()


def work_of(
    model: LanguageModel,
    saes: Mapping[Site, SparseAutoencoder],
    prompts: PromptSet,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """What decides every bit of the result: the model and its number type, the autoencoders, prompts and options."""
    return {
        "model": model.fingerprint,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "autoencoders": fingerprint(saes),
        "prompts": _digest(prompts),
        "options": dict(options),
    }


def _digest(prompts: PromptSet) -> str:
    """A short hash of all tensors of the prompts."""
    digest = hashlib.sha256()
    for part in fields(prompts):
        value = getattr(prompts, part.name)
        tensors = [value.input_ids, value.attention_mask] if isinstance(value, Tokens) else [value]
        for tensor in tensors:
            if isinstance(tensor, Tensor):
                digest.update(f"{part.name} {tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _flat(entries: Mapping[str, Any]) -> dict[str, Any]:
    """`{"options": {"steps": 3}}` -> `{"steps": 3}`."""
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        flat |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return flat
