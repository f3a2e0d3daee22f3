"""Files that a person names for a result: one that this program did not write is not replaced.

1. Drawings and pages carry `MARK`. JSON is told by its keys, safetensors by their header.
2. `check_output` refuses anything else of that name before any work; `--overwrite` (`overwrite=True`) allows it.
3. Files of earlier versions have no mark: they are told by what only they contain.
4. A result's table is plain text: the JSON file of the same name says its digest (`recorded`). `is_foreign` tells what
   has the name of a result and is none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sae._files import parse_json, read_header, read_text
from sae.errors import UserError

MARK = "sparse-feature-circuits"
"""How files name the program that made them; `graphs._files` writes the same."""
READ = 2**26
"""Bytes of a file in which a mark is looked for."""
IsOwn = Callable[[Path], bool]
"""Tells whether a file is what this program writes there."""

_COMMENT = f"Generator: {MARK}".encode()
_SIGNS: dict[str, tuple[tuple[bytes, ...], ...]] = {
    ".svg": (
        (b"<!-- " + _COMMENT,),
        (f"<dc:title>{MARK}</dc:title>".encode(),),  # of Matplotlib
        (b"<title>circuit</title>", b'<g id="site-', b'class="cluster"'),  # before there was a mark
    ),
    ".png": ((b"Software\0" + MARK.encode(),),),
    ".pdf": ((b"%" + _COMMENT,), (f"/Creator ({MARK})".encode(),)),
    ".dot": ((b"// " + _COMMENT,), (b"digraph circuit {", b"layout=nop2", b'id="site-')),
    ".html": (
        (f'<meta name="generator" content="{MARK}">'.encode(),),
        (b'<script type="application/octet-stream" id="circuit">',),
        (b'<div class="figures" id="node-metric">', b'<section id="provenance">'),
    ),
    ".graphml": ((b"<!-- " + _COMMENT,), (b"<graphml", b'attr.name="json"', b'"schema_version"')),
}
"""By kind of file: sets of bytes; a file with all of one set is the program's own."""


def check_no_link(path: Path) -> None:
    """Raises UserError for a file to write, or a folder inside a run, that is a link: what is written would land
    elsewhere, or in place of the link.
    """
    if path.is_symlink():
        raise UserError(f"{str(path)!r} is a link, through which nothing is written: remove it, or name what it is of")


def check_output(path: str | Path, is_own: IsOwn, *, overwrite: bool = False) -> None:
    """Raises UserError for a link, for what is no file, and without `overwrite` for a file that `is_own` denies."""
    path = Path(path)
    check_no_link(path)
    if not path.exists():
        return
    if not path.is_file():
        raise UserError(f"{str(path)!r} is {'a folder' if path.is_dir() else 'no plain file'}: give a file to write")
    if not overwrite and not is_own(path):
        raise UserError(
            f"{str(path)!r} was not written by this program as such a file and is not replaced: give another name, or "
            "--overwrite (overwrite=True)"
        )


def has_mark(kind: str) -> IsOwn:
    """Whether a file is a drawing or page of this program; kind: its extension, such as .svg."""
    return partial(_has_mark, kind={".htm": ".html"}.get(kind.lower(), kind.lower()))


def _has_mark(path: Path, kind: str) -> bool:
    try:
        with path.open("rb") as file:
            content = file.read(READ)
    except OSError:
        return False
    return any(all(sign in content for sign in signs) for signs in _SIGNS.get(kind, ()))


def is_json(fits: Callable[[dict[str, Any]], bool]) -> IsOwn:
    """Whether a file is a JSON object that `fits`."""
    return partial(_is_json, fits=fits)


def _is_json(path: Path, fits: Callable[[dict[str, Any]], bool]) -> bool:
    try:
        return fits(parse_json(read_text(path), path, dict[str, Any]))
    except UserError:
        return False


def like(keys: Collection[str]) -> IsOwn:
    """Whether a file is a JSON object with more than half of its keys and of these in common: another version may have
    some more or fewer.
    """
    return is_json(lambda entries: 2 * len({*entries} & {*keys}) > len({*entries} | {*keys}))


def has_header(*names: str, **entries: str) -> IsOwn:
    """Whether a file is safetensors whose header has entries of these names and values."""
    return partial(_has_header, names=names, entries=entries)


def _has_header(path: Path, names: Collection[str], entries: dict[str, str]) -> bool:
    try:
        header = read_header(path)
    except UserError:
        return False
    return {*names} <= {*header} and entries.items() <= header.items()


RECORDED = "files"
"""Entry of a result's JSON: by extension, digests of the text files beside it."""


def recorded(tables: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """The entry of a result's JSON for text files beside it: {".txt": what it holds} by extension."""
    return {RECORDED: {suffix: _digest(text.encode()) for suffix, text in tables.items()}}


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def is_foreign(path: Path) -> bool:
    """Whether a file with the name of a result is another program's, or was changed by somebody; False for a kind of
    file, or a damaged one, that cannot be told.
    """
    if path.suffix in _SIGNS:
        return not has_mark(path.suffix)(path)
    if path.suffix == ".json":
        return not _json_fits(path, lambda entries: not {"schema_version", "manifest"}.isdisjoint(entries))
    if path.suffix == ".txt":
        written = {path.suffix: _digest(path.read_bytes())}
        return not _json_fits(path.with_suffix(".json"), lambda entries: entries.get(RECORDED, written) == written)
    return False


def _json_fits(path: Path, fits: Callable[[dict[str, Any]], bool]) -> bool:
    """Check as `is_json`; a file that is no JSON at all is damaged, and fits."""
    try:
        entries = parse_json(read_text(path), path)
    except UserError:
        return path.is_file()
    return isinstance(entries, dict) and fits(entries)
