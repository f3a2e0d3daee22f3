"""Store the finished batches of a discovery, so that an interrupted one goes on after the last of them.

1. `partial.json` says which discovery it is: model, autoencoders, prompts, options. Files of another are refused
   with a sentence that says what differs.
2. Every finished batch of a pass is a safetensors file, `nodes-0003` or `edges-0003`, which appears under its name
   only once it is whole; a kill at any moment costs the batch that was running. A damaged one is computed again.
3. Tensors are read back by memory-mapping: what a pass leaves on disk takes memory only where it is used.
4. When the circuit is written, `remove_partial` takes the files away.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor

from circuits.attribution.activations import Setting
from circuits.prompts.dataset import PromptSet
from sae._files import (
    check_digest,
    prepare_folder,
    read_json,
    read_tensors,
    remove_temporary,
    write_json,
    write_tensors,
)
from sae._run.contents import PARTIAL, Layout, check_contents, remove, visible
from sae._run.outputs import check_no_link
from sae.errors import UserError
from sae.model.checks import precision_of
from sae.model.language_model import Tokens
from sae.saes import saes_fingerprint

log = logging.getLogger(__name__)

ABOUT_FILE = "partial.json"
SCHEMA_VERSION = 2


class ResumeFolder:
    """The finished batches of one discovery in a folder of their own."""

    def __init__(self, folder: str | Path, setting: Mapping[str, Any], *, resume: bool) -> None:
        """setting: what `identity_of` says; resume: go on with the files of the same discovery, do not start anew.

        Raises UserError for a folder that holds anything but the files of an interrupted discovery.
        """
        self.folder = Path(folder)
        check_no_link(self.folder)
        check_contents(self.folder, PARTIAL)
        if visible(self.folder) and not interrupted(self.folder):
            raise UserError(
                f"{str(self.folder)!r} is not the folder of an interrupted discovery ({ABOUT_FILE} is missing): give "
                "another one, nothing of it is deleted"
            )
        self._unchecked = {path.name for path in visible(self.folder)} if resume else set()
        noted = self.folder / ABOUT_FILE
        if resume and noted.is_file():
            self._check(read_json(noted), dict(setting))
            remove_temporary(self.folder)
            return
        remove(self.folder, Layout(PARTIAL.files[1:]), with_folder=False)
        prepare_folder(self.folder, overwrite=True)
        write_json(noted, {"schema_version": SCHEMA_VERSION, **setting})

    def _check(self, noted: dict[str, Any], setting: dict[str, Any]) -> None:
        if noted.pop("schema_version", None) != SCHEMA_VERSION:
            raise UserError(f"{self.folder / ABOUT_FILE} is of another version: start again with --overwrite")
        before, now = _flat(noted), _flat(setting)
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise UserError(
                    f"the interrupted discovery in {str(self.folder)!r} had {name} {before.get(name)!r}, not "
                    f"{now.get(name)!r}: resume with the same, or start again with --overwrite"
                )

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The tensors of a finished batch; None where it is not finished, or damaged."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            return None
        try:
            if path.name in self._unchecked:
                check_digest(path)
                self._unchecked.discard(path.name)
            return read_tensors(path)
        except UserError as error:
            log.warning("a finished batch is computed again: %s", error)
            return None

    def put(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a finished batch."""
        copies = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        write_tensors(self.folder / f"{name}.safetensors", copies, checksum=True)
        self._unchecked.discard(f"{name}.safetensors")


def remove_partial(folder: str | Path) -> None:
    """Take the files away, once what they hold is saved; last the one that says what they are."""
    remove(Path(folder), Layout(PARTIAL.files[1:]))
    remove(Path(folder), PARTIAL)


def interrupted(folder: str | Path) -> bool:
    """Whether a folder holds the files of a discovery that did not end."""
    return (Path(folder) / ABOUT_FILE).is_file()


def identity_of(setting: Setting, prompts: PromptSet, options: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides the bits of the result: the model and its number type, the autoencoders, prompts and options."""
    return {
        "model": setting.model.fingerprint,
        **precision_of(setting.model),
        "device": setting.model.device.type,
        "autoencoders": saes_fingerprint(setting.saes),
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
