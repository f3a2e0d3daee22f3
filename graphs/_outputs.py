"""Files that a person names for a drawing, a page or a graph: one that this program did not write is not replaced.

The twin of `sae/_run/outputs.py` for a package that knows nothing of SAEs. Drawings and pages carry a mark
(`graphs._files.MARK`; those of earlier versions are told by what only they contain), JSON is told by its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from graphs._files import MARK, parse_json, read_text
from graphs.errors import GraphError

READ = 2**26
"""Bytes of a file in which a mark is looked for."""
IsOwn = Callable[[Path], bool]
"""Tells whether a file is what this program writes there."""

_COMMENT = f"Generator: {MARK}".encode()
_SIGNS: dict[str, tuple[tuple[bytes, ...], ...]] = {
    ".svg": ((b"<!-- " + _COMMENT,), (b"<title>circuit</title>", b'<g id="site-', b'class="cluster"')),
    ".png": ((b"Software\0" + MARK.encode(),),),
    ".pdf": ((b"%" + _COMMENT,),),
    ".dot": ((b"// " + _COMMENT,), (b"digraph circuit {", b"layout=nop2", b'id="site-')),
    ".html": (
        (f'<meta name="generator" content="{MARK}">'.encode(),),
        (b'<script type="application/octet-stream" id="circuit">',),
    ),
    ".graphml": ((b"<!-- " + _COMMENT,), (b"<graphml", b'attr.name="json"', b'"schema_version"')),
}
"""By kind of file: sets of bytes; a file with all of one set is the program's own. Later sets: of earlier versions."""


def check_output(path: str | Path, is_own: IsOwn, *, overwrite: bool = False) -> None:
    """Raises GraphError for a link, for what is no file, and without `overwrite` for a file that `is_own` denies."""
    path = Path(path)
    if path.is_symlink():
        raise GraphError(f"{str(path)!r} is a link, through which nothing is written: remove it, or name what it is of")
    if not path.exists():
        return
    if not path.is_file():
        raise GraphError(f"{str(path)!r} is {'a folder' if path.is_dir() else 'no plain file'}: give a file to write")
    if not overwrite and not is_own(path):
        raise GraphError(
            f"{str(path)!r} was not written by this program as such a file and is not replaced: give another name, or "
            "overwrite=True"
        )


def has_mark(kind: str) -> IsOwn:
    """Whether a file is a drawing or page of this package; kind: its extension, such as .svg."""
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
    except GraphError:
        return False


is_graph = is_json(lambda entries: {"schema_version", "sites", "nodes", "edges"} <= {*entries})
"""Whether a file is a graph of `FeatureGraph.save`."""
is_eap_ig = is_json(lambda entries: "sparse_feature_circuit" in entries)
"""Whether a file was exported for EAP-IG: it has the entry with what that format has no place for."""
is_neuronpedia = is_json(
    lambda entries: isinstance(head := entries.get("metadata"), dict) and "sparse_feature_circuit" in head
)
"""The same of a file for Neuronpedia."""


def is_annotations(path: Path) -> bool:
    """Whether a file is labels of `write_annotations`, or of the paper's repository: JSON lines with names."""
    try:
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        return all(
            {"Name", "Annotation"} <= {*parse_json(line, path, dict[str, Any])} for line in lines[:1] + lines[-1:]
        )
    except GraphError:
        return False
