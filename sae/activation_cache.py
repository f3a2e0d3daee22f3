"""Activations written once and read by several trainings.

A cache is a folder of shards `shard_00000.safetensors`, each with a tensor [n, width] for every site and the token ids
[n], and `manifest.json`: model and its fingerprint, sites and widths, text, context length, number type, rows of each
shard. The manifest is written last, so a cache without one is incomplete. Rows are the positions that training uses,
in the order of the text. A cache made for another model, site or text is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sae.activations import ContextStream, ModelActivations, StreamState
from sae.errors import UserError
from sae.files import atomic_write, prepare_folder, read_json, write_json
from sae.model import LanguageModel
from sae.sites import Site, select_sites
from sae.text import TextSource

MANIFEST = "manifest.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Manifest:
    """What a cache holds."""

    schema_version: int
    """Version of the layout."""
    model: str
    """Name of the model."""
    model_fingerprint: str
    """Fingerprint of its config and weights."""
    text: str
    """Name of the text."""
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
    shards: list[int]
    """Rows of each shard."""


def write_cache(
    model: LanguageModel,
    texts: str | Path | Iterable[str] | TextSource,
    *,
    sites: str | Sequence[str | Site] = "all",
    tokens: int,
    out: str | Path,
    context_length: int | None = None,
    packed: bool = False,
    exclude_special: bool = True,
    dtype: str = "bfloat16",
    shard_tokens: int = 2**16,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Runs the model over at least `tokens` tokens of text and writes the activations of the sites to `out`."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, allowed are {', '.join(DTYPES)}")
    out = prepare_folder(out, overwrite=overwrite)
    (out / MANIFEST).unlink(missing_ok=True)
    names = sites if isinstance(sites, str) else [str(site) for site in sites]
    chosen, source = select_sites(names, model.sites), TextSource.of(texts)
    stream = ContextStream(model, source, context_length=context_length, packed=packed)
    activations = ModelActivations(model, stream, chosen, exclude_special=exclude_special)
    buffer = {site: torch.empty(shard_tokens, width, device=model.device) for site, width in activations.widths.items()}
    ids = torch.empty(shard_tokens, dtype=torch.int64)
    shards: list[int] = []
    with tqdm(total=tokens, unit="token", disable=not progress) as bar:
        while sum(shards) < tokens:
            n = activations.fill(buffer, ids)
            tensors = {site.name: x[:n].to("cpu", DTYPES[dtype]).contiguous() for site, x in buffer.items()}
            with atomic_write(out / f"shard_{len(shards):05d}.safetensors") as temporary:
                save_file(tensors | {"input_ids": ids[:n].clone()}, temporary)
            shards.append(n)
            bar.update(n)
    widths = {site.name: width for site, width in activations.widths.items()}
    manifest = Manifest(
        1, model.name, model.fingerprint, source.name, widths, stream.context_length, packed, exclude_special, dtype,
        shards,
    )  # fmt: skip
    write_json(out / MANIFEST, asdict(manifest))
    return manifest


class CachedActivations:
    """The rows of a cache, as a trainer reads them; from the beginning again after the last."""

    def __init__(
        self, folder: str | Path, *, model: LanguageModel | None = None, sites: Iterable[Site] | None = None,
        text: str | None = None,
    ):  # fmt: skip
        self.folder = Path(folder)
        if not (self.folder / MANIFEST).is_file():
            raise UserError(f"no activation cache in {str(folder)!r}: looked for {MANIFEST}, which is written last")
        self.manifest = Manifest(**read_json(self.folder / MANIFEST))
        available = {Site.parse(name): width for name, width in self.manifest.sites.items()}
        wanted = list(available) if sites is None else list(sites)
        for what, mine, theirs in (
            ("schema_version", 1, self.manifest.schema_version),
            ("model", model and model.fingerprint, self.manifest.model_fingerprint),
            ("text", text, self.manifest.text),
        ):
            if mine is not None and mine != theirs:
                raise UserError(f"the cache in {str(folder)!r} was made for {what} {theirs!r}, not for {mine!r}")
        if missing := [site for site in wanted if site not in available]:
            has = ", ".join(self.manifest.sites)
            raise UserError(f"the cache in {str(folder)!r} has no site {missing[0]}; it has {has}")
        self.widths = {site: available[site] for site in wanted}
        self._state = StreamState()

    def position(self) -> StreamState:
        """Where the next fill begins; `documents` counts rows."""
        return self._state

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
            with safe_open(self.folder / f"shard_{shard:05d}.safetensors", framework="pt") as tensors:
                for site in self.widths:
                    buffer[site][n : n + rows] = tensors.get_slice(site.name)[offset : offset + rows]
            n, row = n + rows, row + rows
            if row == sum(self.manifest.shards):
                epoch, row = epoch + 1, 0
        self._state = StreamState(epoch=epoch, documents=row)
        return n

    def _locate(self, row: int) -> tuple[int, int]:
        """The shard that holds a row, and the row in it."""
        for shard, size in enumerate(self.manifest.shards):
            if row < size:
                return shard, row
            row -= size
        raise IndexError(row)
