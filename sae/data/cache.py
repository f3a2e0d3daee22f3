"""Activations written once to disk and read by several trainings.

A cache is a folder of shards `shard_00000.safetensors`, each with a tensor [n, width] for every site and the token ids
[n], and `manifest.json`: model, its revision and fingerprint, sites and widths, text and its fingerprint, context
length, number type, rows of each shard.

1. `sae.data.cache_writer.write_cache` runs the model over the text once and writes shard after shard;
   `unfinished.json` says after each what is written and where in the text the next begins. An interrupted run goes on
   there.
2. The manifest is written last; a folder without one is refused.
3. `CachedActivations` reads rows in the order of the text, from the beginning again after the last, and knows what a
   trainer must know of the model (`CachedModel`), which is not loaded.

Rows are the positions that training uses. A cache made for another model, site or text is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from sae._files import CHECKSUM, check_digest, read_header, read_json
from sae.autoencoder import CONTEXT_LENGTH, EXCLUDE_SPECIAL
from sae.data.activations import StreamState, TextRead
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.language_model import LanguageModel
from sae.model.sites import READ_KINDS, Site, select_sites

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
StoredDtype = Literal["bfloat16", "float32", "float16"]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """The contents of a cache."""

    schema_version: int
    """Version of the layout."""
    model: str
    """Name of the model."""
    model_fingerprint: str
    """Fingerprint of its config and weights."""
    revision: str | None
    """Commit on the hub it was loaded from; None for a folder."""
    text: str
    """Name of the text."""
    text_fingerprint: str
    """Fingerprint of the text."""
    sites: dict[str, int]
    """Width of each site, in forward order."""
    context_length: int
    """Longest context in tokens."""
    packed: bool
    """Whether documents were packed."""
    exclude_special: bool
    """Whether special tokens were left out."""
    dtype: str
    """Number type of the activations."""
    tokens: int
    """Tokens that were asked for; there are fewer if the text is shorter."""
    shards: list[int]
    """Rows of each shard."""
    documents: int
    """Documents read."""
    whole_text: bool
    """Whether the text ended before the tokens that were asked for."""
    site_paths: dict[str, str] = field(default_factory=dict)
    """Paths of the sites that are not where the model's architecture has them."""

    @property
    def rows(self) -> int:
        """Tokens in the cache."""
        return sum(self.shards)


@dataclass(frozen=True)
class Unfinished:
    """The progress of a cache that is being written."""

    manifest: Manifest
    """Manifest of the shards on disk."""
    position: StreamState
    """Where in the text the next shard begins."""
    precision: dict[str, str | None] | None = None
    """Number type and quantisation of the model; None where an earlier version wrote it."""


@dataclass(frozen=True)
class CachedModel:
    """The facts a trainer needs of a model it never runs."""

    name: str
    """Its name."""
    fingerprint: str
    """Fingerprint of its config and weights."""
    widths: Mapping[Site, int]
    """Width of each cached site, in forward order."""
    device: torch.device
    """Where to train."""
    moved_sites: Mapping[Site, str] = field(default_factory=dict)
    """Paths of the sites that are not where the model's architecture has them."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The cached sites, at which dictionaries may be trained; places that are read only are none."""
        return tuple(site for site in self.widths if site.kind not in READ_KINDS)

    def device_of(self, site: Site) -> torch.device:
        """The device on which the dictionary of a site is trained."""
        return self.device


def bytes_text(n_bytes: int) -> str:
    """A number of bytes for a person.

    >>> bytes_text(1_234), bytes_text(123_400_000)
    ('1.2 kB', '123.4 MB')
    """
    size = next((size for size in (1e9, 1e6, 1e3) if n_bytes >= size), 1)
    return f"{n_bytes / size:.{2 if size == 1e9 else 1}f} { {1e9: 'GB', 1e6: 'MB', 1e3: 'kB', 1: 'bytes'}[size] }"


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard_{index:05d}.safetensors"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a complete cache."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        if (folder / UNFINISHED).is_file():
            rows = read_json(folder / UNFINISHED, Unfinished).manifest.rows
            raise UserError(
                f"the cache in {str(folder)!r} is not finished ({rows:,} tokens): go on with sfc cache --resume"
            )
        raise UserError(f"no activation cache in {str(folder)!r}: looked for {MANIFEST}, which is written last")
    manifest = read_json(folder / MANIFEST, Manifest)
    if manifest.schema_version != SCHEMA_VERSION:
        raise UserError(f"{folder / MANIFEST} has schema_version {manifest.schema_version!r}, allowed is 1")
    if min(manifest.sites.values(), default=0) < 1 or min(manifest.shards, default=0) < 1:
        raise UserError(f"{folder / MANIFEST} names no sites or shards, or one without width or rows: it is damaged")
    return manifest


class CachedActivations:
    """The rows of a cache, as a trainer reads them; from the beginning again after the last.

    `model` and `text`, where they are given, must be those the cache was made for; `sites` are names or "all".
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        model: LanguageModel | CachedModel | None = None,
        sites: str | Iterable[Site | str] = "all",
        text: TextSource | str | Path | None = None,
        device: str | torch.device = "cpu",
    ):
        self.folder, self.device = Path(folder), torch.device(device)
        self.manifest = manifest = read_manifest(self.folder)
        if model is not None:
            made_for = manifest.model_fingerprint
            same = isinstance(model, LanguageModel) and model.is_model(made_for)
            self._check("model", model.name, made_for if same else model.fingerprint, manifest.model, made_for)
        if text is not None:
            source = TextSource.of(text)
            self._check("text", source.name, source.fingerprint, manifest.text, manifest.text_fingerprint)
        available = {Site.parse(name): width for name, width in manifest.sites.items()}
        try:
            chosen = select_sites(sites, tuple(available))
        except UserError as error:
            raise UserError(f"the cache in {str(folder)!r} has not all of these sites: {error}") from None
        self.widths = {site: available[site] for site in chosen}
        if isinstance(model, LanguageModel):
            self._check_site_paths(model)
        self._state = StreamState()
        self.rows_at_once = 1
        self.reading: dict[str, Any] = {
            CONTEXT_LENGTH: manifest.context_length,
            EXCLUDE_SPECIAL: manifest.exclude_special,
        }
        self._checked: set[Path] = set()

    @property
    def model(self) -> CachedModel:
        """The model as far as training needs it."""
        moved = {Site.parse(name): path for name, path in self.manifest.site_paths.items()}
        return CachedModel(self.manifest.model, self.manifest.model_fingerprint, self.widths, self.device, moved)

    @property
    def text(self) -> TextSource:
        """The text it was made from."""
        return TextSource(self.manifest.text, digest=self.manifest.text_fingerprint)

    @property
    def identity(self) -> str:
        """A short hash of the manifest: two caches with the same one hold the same."""
        return hashlib.sha256(json.dumps(asdict(self.manifest)).encode()).hexdigest()[:16]

    def only(self, sites: Iterable[Site]) -> CachedActivations:
        """Reopen the cache at its beginning, with some of its sites."""
        return CachedActivations(self.folder, sites=sites, device=self.device)

    def _check(self, what: str, name: str, fingerprint: str, made_for: str, noted: str) -> None:
        if fingerprint != noted:
            given = f"{name!r} as it is now" if name == made_for else repr(name)
            raise UserError(f"the cache in {str(self.folder)!r} was made for {what} {made_for!r}, not {given}")

    def _check_site_paths(self, model: LanguageModel) -> None:
        for site in self.widths:
            made_at, read_at = self.manifest.site_paths.get(site.name, ""), model.moved_sites.get(site, "")
            if not model.reads_at(site, made_at):
                raise UserError(
                    f"the cache in {str(self.folder)!r} has site {site} from {made_at or 'its usual place'}, the model "
                    f"was loaded with it at {read_at or 'its usual place'}"
                )

    def position(self) -> StreamState:
        """The row at which the next fill begins, as `documents`."""
        return self._state

    def text_read(self) -> TextRead:
        """All that the cache was made from."""
        return TextRead(self.manifest.documents, self.manifest.whole_text)

    def seek(self, state: StreamState) -> None:
        """Makes the next fill begin there."""
        self._state = state

    def fill(self, buffer: dict[Site, Tensor]) -> int:
        """Copies rows into [n, width] tensors until they are full."""
        capacity, n = len(next(iter(buffer.values()))), 0
        epoch, row = self._state.epoch, self._state.documents
        while n < capacity:
            shard, offset = self._locate(row)
            rows = min(capacity - n, self.manifest.shards[shard] - offset)
            self._read(shard, offset, rows, {site: x[n : n + rows] for site, x in buffer.items()})
            n, row = n + rows, row + rows
            if row == self.manifest.rows:
                epoch, row = epoch + 1, 0
        self._state = StreamState(epoch=epoch, documents=row)
        return n

    def _read(self, shard: int, offset: int, rows: int, into: Mapping[Site, Tensor]) -> None:
        path = shard_path(self.folder, shard)
        try:
            self._check_once(path)
            with safe_open(path, framework="pt") as tensors:
                for site, x in into.items():
                    x.copy_(tensors.get_slice(site.name)[offset : offset + rows])
                    if not x.isfinite().all():
                        raise UserError(f"site {site} holds numbers that are not finite")
        except Exception as error:  # safetensors raises its own kind, OSError, or torch's for a wrong shape
            raise UserError(f"{str(path)!r} is missing or damaged: write the cache again ({error})") from error

    def _check_once(self, path: Path) -> None:
        """Hold a shard against its checksum when it is read for the first time."""
        if path not in self._checked and CHECKSUM in read_header(path):
            check_digest(path)
        self._checked.add(path)

    def _locate(self, row: int) -> tuple[int, int]:
        """The shard that holds a row, and the row in it."""
        for shard, size in enumerate(self.manifest.shards):
            if row < size:
                return shard, row
            row -= size
        raise IndexError(row)
