"""Labels that people wrote: JSON lines as in the paper's repository, one feature a line.

    {"Component": "resid", "Layer": 5, "Feature": 3036, "Name": "resid_5/3036", "Annotation": "plural nouns"}

`Name` suffices; without it, `Component`, `Layer` (absent for the embedding) and `Feature` spell it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph
from graphs.files import write_text

logger = logging.getLogger(__name__)

_NAME = re.compile(r"\w+/\w+(@.+)?", re.DOTALL)


def read_annotations(path: str | Path) -> dict[str, str]:
    """Feature name -> annotation, the last line of a name counting; lines with an empty annotation are skipped.

    A malformed line raises GraphError with the file and the line number.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise GraphError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise GraphError(f"{path}: not a text file in UTF-8") from None
    labels = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise GraphError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        name, annotation = _entry(entry, f"{path}, line {number}")
        if annotation:
            labels[name] = annotation
    return labels


def write_annotations(labels: Mapping[str, str], path: str | Path) -> None:
    """Write labels so that `read_annotations` reads them back."""
    write_text(path, "".join(json.dumps(_line(name, text), ensure_ascii=False) + "\n" for name, text in labels.items()))


def apply(graph: FeatureGraph, labels: Mapping[str, str]) -> FeatureGraph:
    """Label the nodes, by id (`resid_5/3036@2`) or by name at every position; other names are counted in the log."""
    absent = unmatched(graph, labels)
    if absent:
        logger.info("%d of %d annotations are of features outside this graph", len(absent), len(labels))
    return graph.with_labels(labels)


def unmatched(graph: FeatureGraph, labels: Mapping[str, str]) -> list[str]:
    """The names among the labels that no node of the graph has."""
    known = {key for node in graph.nodes() for key in (node.id, node.name)}
    return [name for name in labels if name not in known]


def _entry(entry: Any, where: str) -> tuple[str, str]:
    """Name and annotation of one line."""
    if not isinstance(entry, dict):
        raise GraphError(f"{where}: expected an object with Name and Annotation, found {entry!r:.60}")
    name = entry.get("Name") or _spelt(entry)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise GraphError(f"{where}: Name is {name!r}, expected something like 'resid_5/3036'")
    if "Annotation" not in entry:
        raise GraphError(f"{where}: key 'Annotation' is missing")
    annotation = entry["Annotation"]
    if annotation is not None and not isinstance(annotation, str):
        raise GraphError(f"{where}: Annotation is {annotation!r:.60}, expected text")
    return name, (annotation or "").strip()


def _spelt(entry: Mapping[str, Any]) -> str | None:
    """`resid_5/3036` from Component, Layer and Feature."""
    component, layer, feature = (entry.get(key) for key in ("Component", "Layer", "Feature"))
    if not isinstance(component, str) or isinstance(feature, bool) or not isinstance(feature, int):
        return None
    return f"{component}/{feature}" if layer is None or component == "embed" else f"{component}_{layer}/{feature}"


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
