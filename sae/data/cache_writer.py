"""Writing activations to disk, shard after shard (`sae.data.cache` says what a cache is and reads it).

1. The folder is checked: it holds a cache, or nothing. Shards of one that is replaced are removed first of all.
2. The model runs over the text once; `unfinished.json` says after each shard what is written and where in the text the
   next begins.
3. The manifest is written last. A run that was interrupted goes on after its last shard; those that are there are held
   against their checksums.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from sae._files import (
    CHECKSUM,
    check_digest,
    prepare_folder,
    read_header,
    read_json,
    remove_temporary,
    write_json,
    write_tensors,
    write_text,
)
from sae._progress import ProgressBar
from sae._run.contents import CACHE, Layout, check_contents, remove, visible
from sae._run.locks import lock
from sae.data.activations import ContextStream, ModelActivations, StreamState
from sae.data.cache import (
    DTYPES,
    MANIFEST,
    SCHEMA_VERSION,
    UNFINISHED,
    Manifest,
    StoredDtype,
    Unfinished,
    bytes_text,
    read_manifest,
    shard_path,
)
from sae.data.text import TextSource
from sae.errors import UserError
from sae.model.checks import precision_of
from sae.model.language_model import LanguageModel
from sae.model.sites import READ_KINDS, Site, select_sites

SHARD_TOKENS = 2**16
SHARD_BYTES = 2**30
"""Most memory for the rows of one shard, in float32."""
ID_BYTES = 4


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
    dtype: StoredDtype = "bfloat16",
    shard_tokens: int = SHARD_TOKENS,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Manifest:
    """Runs the model once over the text and writes the activations of the sites to `out`.

    At least `tokens` tokens, up to one forward pass more; fewer where the text ends before, for a cache holds no
    text twice. Places that transcoders read are named beside the sites: "mlp,mlp_in".
    """
    _check_options(dtype, tokens, shard_tokens)
    chosen, source, out = select_places(model, sites), TextSource.of(texts), Path(out)
    stream = ContextStream(model, source, context_length=context_length, packed=packed)
    activations = ModelActivations(model, stream, chosen, exclude_special=exclude_special)
    begun = Manifest(
        SCHEMA_VERSION, model.name, model.fingerprint, model.revision, source.name, source.fingerprint,
        {site.name: width for site, width in activations.widths.items()}, stream.context_length, packed,
        exclude_special, dtype, tokens, [], 0, False,
        {site.name: path for site, path in model.moved_sites.items() if site in chosen},
    )  # fmt: skip
    stream.peek()  # text that cannot be read is told before anything is written
    with lock(out):
        _check_folder(out, resume=resume, overwrite=overwrite)
        if resume and (out / MANIFEST).is_file():
            complete = _same(begun, read_manifest(out), out)
            _check_shards(complete, out)
            _clean(complete, out)
            return complete
        if resume and (out / UNFINISHED).is_file():
            begun, position = _unfinished(begun, out, precision_of(model))
            stream.seek(position)
        _check_space(out, cache_bytes(activations.widths.values(), tokens - begun.rows, dtype))
        if not begun.shards:
            _remove_earlier(Unfinished(begun, stream.state, precision_of(model)), out)
        manifest = _write_shards(activations, begun, out, shard_tokens, progress)
        _finish(manifest, out)
    return manifest


def select_places(model: LanguageModel, sites: str | Sequence[str | Site]) -> list[Site]:
    """The sites that a user asks for, with the places that transcoders read where they are named: "all,mlp_in"."""
    named = sites if isinstance(sites, str) else ",".join(map(str, sites))
    reads = [site for kind in READ_KINDS if kind in named for site in model.reads.points if site.kind == kind]
    return select_sites(sites, [*model.sites, *reads])


def _check_options(dtype: str, tokens: int, shard_tokens: int) -> None:
    if dtype not in DTYPES:
        raise UserError(f"the cache's number type is {dtype!r}, allowed are {', '.join(DTYPES)}")
    if tokens < 1 or shard_tokens < 1:
        raise UserError(f"tokens is {tokens} and shard_tokens {shard_tokens}: both must be at least 1")


def _check_folder(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds anything but a cache that is to be replaced or resumed."""
    check_contents(out, CACHE)
    begun = (out / MANIFEST).is_file() or (out / UNFINISHED).is_file()
    if visible(out) and not begun:
        raise UserError(f"{str(out)!r} holds shards but no {MANIFEST} or {UNFINISHED}: give another folder")
    prepare_folder(out, overwrite=overwrite or resume)


def _check_shards(manifest: Manifest, out: Path) -> None:
    """Read all shards that are there and hold their bits against their checksums."""
    for index in range(len(manifest.shards)):
        path = shard_path(out, index)
        if not path.is_file() or CHECKSUM in read_header(path):
            check_digest(path)


def _remove_earlier(begun: Unfinished, out: Path) -> None:
    """Remove the shards of the cache that is replaced; that it is gone is noted first of all."""
    _note(out, begun)
    (out / MANIFEST).unlink(missing_ok=True)
    remove(out, Layout(CACHE.files[2:]))


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
    with ProgressBar(total=manifest.tokens, initial=manifest.rows, unit="token", disable=not progress) as bar:
        while manifest.rows < manifest.tokens and not manifest.whole_text:
            one_pass = sum(map(len, activations.stream.peek()))
            size = max(min(most, manifest.tokens - manifest.rows), one_pass)
            buffer = {site: torch.empty(size, width, device=device) for site, width in activations.widths.items()}
            ids = torch.empty(size, dtype=torch.int64)
            n = activations.fill(buffer, ids, one_epoch=True)
            if n:
                tensors = {site.name: _stored(x[:n], site, manifest.dtype) for site, x in buffer.items()}
                tensors["input_ids"] = ids[:n].to(torch.int32)
                write_tensors(shard_path(out, len(manifest.shards)), tensors, checksum=True)
            read = activations.text_read()
            shards = [*manifest.shards, n] if n else manifest.shards
            manifest = replace(manifest, shards=shards, documents=read.documents, whole_text=read.is_all)
            _note(out, Unfinished(manifest, activations.position(), precision_of(activations.model)))
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


def _note(out: Path, progress: Unfinished) -> None:
    """Write down what is on disk and where in the text the next shard begins."""
    write_text(out / UNFINISHED, json.dumps(asdict(progress)))


def _unfinished(begun: Manifest, out: Path, precision: dict[str, str | None]) -> tuple[Manifest, StreamState]:
    """The manifest and position at which an interrupted run stopped; precision: that of the model now."""
    noted = read_json(out / UNFINISHED, Unfinished)
    before = noted.precision or precision
    if before != precision:
        raise UserError(
            f"the cache in {str(out)!r} was begun with a model in {_words(before)} and cannot go on with one in "
            f"{_words(precision)}: load the model as it was, give another folder or allow overwriting"
        )
    manifest = _same(begun, noted.manifest, out)
    _check_shards(manifest, out)
    return manifest, noted.position


def _words(precision: dict[str, str | None]) -> str:
    return ", ".join(filter(None, precision.values()))


def _same(asked: Manifest, begun: Manifest, out: Path) -> Manifest:
    """The manifest of the begun cache, after a check that its options are the same."""
    progress = ("shards", "documents", "whole_text", "model", "text", "revision")
    for key, value in asdict(asked).items():
        if key not in progress and value != getattr(begun, key):
            raise UserError(
                f"the cache in {str(out)!r} was begun with {key} {getattr(begun, key)!r} and cannot go on with "
                f"{value!r}: give the same options, another folder or allow overwriting"
            )
    return begun


def _check_space(out: Path, needed: int) -> None:
    """Refuse what the disk cannot hold."""
    folder = next(parent for parent in (out.absolute(), *out.absolute().parents) if parent.is_dir())
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"the cache needs {bytes_text(needed)} and the disk of {str(out)!r} has {bytes_text(free)} free: "
            "give fewer tokens or sites, bfloat16, or another folder"
        )
