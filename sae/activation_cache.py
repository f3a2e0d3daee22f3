"""Activations written once to disk and read by several trainings.

A cache is a folder of shards `shard_00000.safetensors`, each with a tensor [n, width] for every site and the token ids
[n], and `manifest.json`: model, its revision and fingerprint, sites and widths, text and its fingerprint, context
length, number type, rows of each shard.

1. `write_cache` runs the model over the text once and writes shard after shard; `unfinished.json` says after each what
   is written and where in the text the next begins. A run that was interrupted goes on there with `resume=True`.
2. The manifest is written last; a folder without one is refused.
3. `CachedActivations` reads rows in the order of the text, from the beginning again after the last, and knows what a
   trainer must know of the model (`CachedModel`), which is not loaded.

Rows are the positions that training uses. A cache made for another model, site or text is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from sae.activations import ContextStream, ModelActivations, StreamState, TextRead
from sae.config import TrainConfig
from sae.errors import UserError
from sae.files import prepare_folder, read_json, remove_temporary, write_json, write_tensors, write_text
from sae.model import LanguageModel
from sae.sites import Site, select_sites
from sae.text import TextSource

MANIFEST, UNFINISHED = "manifest.json", "unfinished.json"
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SHARD_TOKENS = 2**16
SHARD_BYTES = 2**30
"""Most memory for the rows of one shard, in float32."""
ID_BYTES = 4
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a cache holds."""

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
class CachedModel:
    """What a trainer must know of a model it never runs."""

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
        """The cached sites."""
        return tuple(self.widths)


def cache_bytes(widths: Iterable[int], tokens: int, dtype: str) -> int:
    """Size on disk of `tokens` tokens: activations of all sites and a 4-byte token id."""
    return tokens * (sum(widths) * DTYPES[dtype].itemsize + ID_BYTES)


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
    shard_tokens: int = SHARD_TOKENS,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Runs the model once over the text and writes the activations of the sites to `out`.

    At least `tokens` tokens, up to one forward pass more; fewer where the text ends before, for a cache holds no
    text twice.
    """
    if dtype not in DTYPES:
        raise UserError(f"the cache's number type is {dtype!r}, allowed are {', '.join(DTYPES)}")
    if tokens < 1 or shard_tokens < 1:
        raise UserError(f"tokens is {tokens} and shard_tokens {shard_tokens}: both must be at least 1")
    names = sites if isinstance(sites, str) else [str(site) for site in sites]
    chosen, source, out = select_sites(names, model.sites), TextSource.of(texts), Path(out)
    stream = ContextStream(model, source, context_length=context_length, packed=packed)
    activations = ModelActivations(model, stream, chosen, exclude_special=exclude_special)
    begun = Manifest(
        SCHEMA_VERSION, model.name, model.fingerprint, model.revision, source.name, source.fingerprint,
        {site.name: width for site, width in activations.widths.items()}, stream.context_length, packed,
        exclude_special, dtype, tokens, [], 0, False,
        {site.name: path for site, path in model.moved_sites.items() if site in chosen},
    )  # fmt: skip
    if resume and (out / MANIFEST).is_file():
        whole = _same(begun, read_manifest(out), out)
        _clean(whole, out)
        return whole
    if resume and (out / UNFINISHED).is_file():
        begun, position = _unfinished(begun, out)
        stream.seek(position)
    stream.peek()  # text that cannot be read is told before anything is written
    _check_space(out, cache_bytes(activations.widths.values(), tokens - begun.rows, dtype))
    prepare_folder(out, overwrite=overwrite or resume)
    if not begun.shards:
        (out / MANIFEST).unlink(missing_ok=True)
        _note(out, begun, stream.state)
    manifest = _write_shards(activations, begun, out, shard_tokens, progress)
    _finish(manifest, out)
    return manifest


def _finish(manifest: Manifest, out: Path) -> None:
    """The cache is whole: say so, and remove what an earlier one or a killed process left."""
    write_json(out / MANIFEST, asdict(manifest))
    _clean(manifest, out)


def _clean(manifest: Manifest, out: Path) -> None:
    """Removes all that is not part of a whole cache."""
    remove_temporary(out)
    (out / UNFINISHED).unlink(missing_ok=True)
    for surplus in set(out.glob("shard_*.safetensors")) - {shard_path(out, i) for i in range(len(manifest.shards))}:
        surplus.unlink()


def _write_shards(
    activations: ModelActivations, manifest: Manifest, out: Path, shard_tokens: int, progress: bool
) -> Manifest:
    """Shards until there are tokens enough or the text ends."""
    bytes_per_row = 4 * sum(activations.widths.values())
    most = min(shard_tokens, SHARD_BYTES // bytes_per_row)
    device = activations.model.device
    with tqdm(total=manifest.tokens, initial=manifest.rows, unit="token", disable=not progress) as bar:
        while manifest.rows < manifest.tokens and not manifest.whole_text:
            one_pass = sum(map(len, activations.stream.peek()))
            size = max(min(most, manifest.tokens - manifest.rows), one_pass)
            buffer = {site: torch.empty(size, width, device=device) for site, width in activations.widths.items()}
            ids = torch.empty(size, dtype=torch.int64)
            n = activations.fill(buffer, ids, one_epoch=True)
            if n:
                tensors = {site.name: _stored(x[:n], site, manifest.dtype) for site, x in buffer.items()}
                tensors["input_ids"] = ids[:n].to(torch.int32)
                write_tensors(shard_path(out, len(manifest.shards)), tensors)
            read = activations.text_read()
            shards = [*manifest.shards, n] if n else manifest.shards
            manifest = replace(manifest, shards=shards, documents=read.documents, whole_text=read.whole)
            _note(out, manifest, activations.position())
            bar.update(n)
    return manifest


def _stored(x: Tensor, site: Site, dtype: str) -> Tensor:
    """x on the CPU in the cache's number type; `UserError` where that cannot hold it."""
    stored = x.to("cpu", DTYPES[dtype])
    if not stored.isfinite().all():
        raise UserError(
            f"activations of site {site} reach {float(x.abs().max()):.3g}, and {dtype} holds no more than "
            f"{torch.finfo(stored.dtype).max:.3g}: write the cache in bfloat16 or float32, or without that site"
        )
    return stored


def _note(out: Path, manifest: Manifest, position: StreamState) -> None:
    """Write down what is on disk and where in the text the next shard begins."""
    write_text(out / UNFINISHED, json.dumps({"manifest": asdict(manifest), "position": asdict(position)}))


def _unfinished(begun: Manifest, out: Path) -> tuple[Manifest, StreamState]:
    """How far an interrupted run came."""
    noted = read_json(out / UNFINISHED)
    return _same(begun, Manifest(**noted["manifest"]), out), StreamState.from_json(noted["position"])


def _same(wanted: Manifest, found: Manifest, out: Path) -> Manifest:
    """What was found, after a check that it was begun with the same options."""
    progress = ("shards", "documents", "whole_text", "model", "text", "revision")
    for key, value in asdict(wanted).items():
        if key not in progress and value != getattr(found, key):
            raise UserError(
                f"the cache in {str(out)!r} was begun with {key} {getattr(found, key)!r} and cannot go on with "
                f"{value!r}: give the same options, another folder or allow overwriting"
            )
    return found


def _check_space(out: Path, needed: int) -> None:
    """Refuse what the disk cannot hold."""
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"the cache needs {needed / 1e9:.2f} GB and the disk of {str(out)!r} has {free / 1e9:.2f} GB free: "
            "give fewer tokens or sites, bfloat16, or another folder"
        )


def shard_path(folder: Path, index: int) -> Path:
    """The file of a shard."""
    return folder / f"shard_{index:05d}.safetensors"


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a complete cache."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        if (folder / UNFINISHED).is_file():
            rows = Manifest(**read_json(folder / UNFINISHED)["manifest"]).rows
            raise UserError(f"the cache in {str(folder)!r} is not finished ({rows:,} tokens): resume writing it first")
        raise UserError(f"no activation cache in {str(folder)!r}: looked for {MANIFEST}, which is written last")
    entries = read_json(folder / MANIFEST)
    if entries.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"{folder / MANIFEST} has schema_version {entries.get('schema_version')!r}, allowed is 1")
    return Manifest(**entries)


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
        names = sites if isinstance(sites, str) else [str(site) for site in sites]
        try:
            chosen = select_sites(names, tuple(available))
        except UserError as error:
            raise UserError(f"the cache in {str(folder)!r} has not all of these sites: {error}") from None
        self.widths = {site: available[site] for site in chosen}
        if isinstance(model, LanguageModel):
            self._check_places(model)
        self._state = StreamState()
        self.rows_at_once = 1

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
        """The same cache from its beginning, with some of its sites."""
        return CachedActivations(self.folder, sites=sites, device=self.device)

    def fitted(self, config: TrainConfig) -> TrainConfig:
        """A training config with the cache's contexts; refuses one that asks for others."""
        usual = TrainConfig()
        for name in ("context_length", "packed", "exclude_special"):
            asked, has = getattr(config, name), getattr(self.manifest, name)
            if asked not in (getattr(usual, name), has):
                raise UserError(f"the cache in {str(self.folder)!r} was made with {name} {has}, not {asked}")
            config = replace(config, **{name: has})
        return config

    def _check(self, what: str, name: str, fingerprint: str, made_for: str, known: str) -> None:
        if fingerprint != known:
            given = f"{name!r} as it is now" if name == made_for else repr(name)
            raise UserError(f"the cache in {str(self.folder)!r} was made for {what} {made_for!r}, not {given}")

    def _check_places(self, model: LanguageModel) -> None:
        for site in self.widths:
            made_at, here = self.manifest.site_paths.get(site.name, ""), model.moved_sites.get(site, "")
            if not model.reads_at(site, made_at):
                raise UserError(
                    f"the cache in {str(self.folder)!r} has site {site} from {made_at or 'its usual place'}, the model "
                    f"was loaded with it at {here or 'its usual place'}"
                )

    def position(self) -> StreamState:
        """Where the next fill begins; `documents` counts rows."""
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
            with safe_open(path, framework="pt") as tensors:
                for site, x in into.items():
                    x.copy_(tensors.get_slice(site.name)[offset : offset + rows])
                    if not x.isfinite().all():
                        raise UserError(f"site {site} holds numbers that are not finite")
        except Exception as error:  # safetensors raises its own kind, OSError, or torch's for a wrong shape
            raise UserError(f"{str(path)!r} is missing or damaged: write the cache again ({error})") from error

    def _locate(self, row: int) -> tuple[int, int]:
        """The shard that holds a row, and the row in it."""
        for shard, size in enumerate(self.manifest.shards):
            if row < size:
                return shard, row
            row -= size
        raise IndexError(row)
