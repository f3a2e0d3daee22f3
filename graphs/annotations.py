"""Labels that people wrote: JSON lines as in the paper's repository, one feature a line.

    {"Component": "resid", "Layer": 5, "Feature": 3036, "Name": "resid_5/3036", "Annotation": "plural nouns"}

Lines of a `labels.jsonl` are read too, and those of `sfc labels --contexts` when a labeller has filled them in:
{"site": "resid_5", "feature": 3036, "label": "plural nouns", "score": 0.9}.

`Name` suffices; without it, `Component`, `Layer` (absent for the embedding) and `Feature` spell it. Errors and spans
have names as well: `resid_5/error`, `resid_5/3036@subject`. The paper's files have rows without an annotation and,
inside, a row of headings (`"Name": "Name"`): these are skipped and counted.
"""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat
from typing_extensions import TypedDict

from graphs._files import parse_json, read_text, write_text
from graphs._outputs import check_output, is_annotations
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\w+/\w+(@.+)?", re.DOTALL)


class _Line(TypedDict, total=False):
    """The keys that are read of a line."""

    Component: str | None
    Layer: int | str | None
    Feature: int | str | None
    Name: str | None
    Annotation: str | None
    site: str
    feature: int | str
    label: str | None
    score: FiniteFloat | None


def read_annotations(path: str | Path) -> dict[str, str]:
    """Read labels of features; the last line of a name counts, and one warning counts what is skipped.

    Args:
        path: JSON lines as the paper's annotations have them, or as `write_annotations` writes them.

    Returns:
        Name of a feature, such as `resid_3/120` -> its label.

    Raises:
        GraphError: With the file and the line, for a malformed line, or a file without any label.
    """
    labels: dict[str, str] = {}
    skipped: Counter[str] = Counter()
    for where, entry in _lines(path):
        if _is_heading(entry):
            skipped["with headings"] += 1
            continue
        name, annotation = _name(entry, where), (entry.get("Annotation") or "").strip()
        if annotation:
            labels[name] = annotation
        else:
            skipped["without an annotation"] += 1
    if skipped and not labels:
        raise GraphError(f'{path}: no line has an annotation: write {{"Name": "resid_3/120", "Annotation": "..."}}')
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        logger.warning("%s: %d annotations; skipped lines: %s", path, len(labels), counts)
    return labels


def read_scores(path: str | Path) -> dict[str, float]:
    """Feature name -> how good its label was found to be, of the lines that have a `score`, the last one counting."""
    return {_name(entry, where): entry["score"] for where, entry in _lines(path) if entry.get("score") is not None}


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every line of a file with its place, those of a `labels.jsonl` in the words of the paper's repository."""
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            entry = parse_json(line, where, _Line)
            if "label" in entry:
                name = f"{entry.get('site')}/{entry.get('feature')}"
                entry = {"Name": name, "Annotation": entry["label"], "score": entry.get("score")}
            yield where, entry


def write_annotations(labels: Mapping[str, str], path: str | Path, *, overwrite: bool = False) -> None:
    """Write labels so that `read_annotations` reads them back.

    Args:
        labels: Name of a feature, such as `resid_3/120` -> its label.
        path: The file.
        overwrite: Whether any other file is replaced.

    Raises:
        GraphError: For another file there, unless `overwrite`.
    """
    check_output(path, is_annotations, overwrite=overwrite)
    write_text(path, "".join(json.dumps(_line(name, text), ensure_ascii=False) + "\n" for name, text in labels.items()))


def apply(graph: FeatureGraph, labels: Mapping[str, str]) -> FeatureGraph:
    """Label the nodes, by id (`resid_5/3036@2`) or by name at every position; other names are counted in the log."""
    absent = unmatched(graph, labels)
    if absent:
        logger.info("%d of %d annotations are of features outside this graph", len(absent), len(labels))
    return graph.with_labels(labels)


def unmatched(graph: FeatureGraph, labels: Mapping[str, str]) -> list[str]:
    """The names among the labels that no node of the graph has."""
    names = {key for node in graph.nodes() for key in (node.id, node.name)}
    return [name for name in labels if name not in names]


def _is_heading(entry: Mapping[str, Any]) -> bool:
    """Whether the line repeats the names of the columns."""
    values = {key.lower(): str(value or "").lower() for key, value in entry.items()}
    return any(values.values()) and all(value in (key, "") for key, value in values.items())


def _name(entry: Mapping[str, Any], where: str) -> str:
    """`resid_5/3036` as given, or from Component, Layer and Feature."""
    name = entry.get("Name") or _spelt(entry)
    if name is None or not _NAME.fullmatch(name):
        raise GraphError(f"{where}: Name is {name!r:.80}, expected something like 'resid_5/3036'")
    return name


def _spelt(entry: Mapping[str, Any]) -> str | None:
    component, layer, feature = (entry.get(key) for key in ("Component", "Layer", "Feature"))
    if not component or feature in (None, "") or not re.fullmatch(r"[0-9]+|error|skip", str(feature)):
        return None
    return f"{component}/{feature}" if layer in (None, "") or component == "embed" else f"{component}_{layer}/{feature}"


def _line(name: str, text: str) -> dict[str, Any]:
    site, _, feature = name.partition("/")
    component, _, layer = site.partition("_")
    return {
        "Component": component,
        "Layer": int(layer) if layer.isdecimal() else None,
        "Feature": int(feature) if feature.isdecimal() else feature,
        "Name": name,
        "Annotation": text,
        "Notes": "",
    }
