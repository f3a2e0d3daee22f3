"""A folder that circuit-tracer's page opens: `circuit_tracer.frontend.local_server.serve(data_dir=FOLDER)`.

    FOLDER/graph-metadata.json      the graphs that the page offers
    FOLDER/SLUG.json                one graph (`graphs.formats.neuronpedia`), as `read_neuronpedia` reads it back
    FOLDER/features/SLUG/N.json     what the page shows of a feature; N pairs its row and index (`cantor`)

The page looks for features in the places that `transcoder_list` names, one a row, where `scan` begins with `custom-`;
without a network it finds none otherwise. Neuronpedia takes the same files from an address (`features_url`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
from typing_extensions import TypedDict

from graphs._files import parse_json, read_json, read_text, write_json
from graphs._outputs import check_output, is_json, is_neuronpedia
from graphs.drawing.style import describe, visible
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph, Node
from graphs.formats.attribution_graph import EXTRA
from graphs.formats.neuronpedia import CIRCUIT_TRACER, to_neuronpedia

METADATA_FILE = "graph-metadata.json"
FEATURES_FOLDER = "features"
CUSTOM = "custom-"
PERCENTILES = np.arange(1, 101) / 100

_is_feature_file = is_json(lambda entries: EXTRA in entries)


class _Offered(TypedDict):
    """graph-metadata.json."""

    graphs: list[dict[str, Any]]


def write_circuit_tracer(
    graph: FeatureGraph, folder: str | Path, *, scan: str = "", slug: str = "", overwrite: bool = False
) -> Path:
    """Write a graph for circuit-tracer's page, with the contexts of its features.

    Args:
        graph: The graph; contexts and numbers of features are taken from its nodes' attributes.
        folder: The folder to serve; graphs that this program wrote there before stay.
        scan: Name of the model; by default made of `graph.metadata["model"]`.
        slug: Name of the graph; by default made of its title.
        overwrite: Whether files of other programs are replaced, and theirs in graph-metadata.json kept.

    Returns:
        The graph's file.

    Raises:
        GraphError: For a file of another program, or a name with a sign that is not permitted.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise GraphError(f"{str(folder)!r} is a file: give a folder for circuit-tracer's page")
    data = to_neuronpedia(graph, scan=scan, slug=slug, viewer=CIRCUIT_TRACER)
    head = data["metadata"]
    path, features = folder / f"{head['slug']}.json", folder / FEATURES_FOLDER / head["slug"]
    if path.name == METADATA_FILE:
        raise GraphError(f"slug {head['slug']!r} is the name of the page's own file: give another one")
    rows = max((int(item["layer"]) for item in data["nodes"] if item["layer"] != "E"), default=0)
    head["scan"] = head["scan"] if head["scan"].startswith(CUSTOM) else CUSTOM + head["scan"]
    head["transcoder_list"] = [f"./data/{FEATURES_FOLDER}/{head['slug']}"] * (rows + 1)
    pages = {features / f"{number}.json": page for number, page in _feature_pages(graph, data["nodes"])}

    offered = _offered(folder / METADATA_FILE, overwrite=overwrite)
    check_output(path, is_neuronpedia, overwrite=overwrite)
    for page in pages:
        check_output(page, _is_feature_file, overwrite=overwrite)
    for file, page in pages.items():
        write_json(file, page)
    write_json(path, data)
    entry = {**head, EXTRA: {"schema_version": head[EXTRA]["schema_version"]}}
    others = [other for other in offered if other.get("slug") != head["slug"]]
    write_json(folder / METADATA_FILE, {"graphs": [entry, *others]})
    return path


def page_address(path: str | Path, *, port: int = 8032) -> str:
    """The address where a local server shows a graph's file; pinned nodes and supernodes are read from there alone."""
    state = read_json(path, dict[str, Any])["qParams"]
    query = {"slug": Path(path).stem}
    query |= {"pinnedIds": ",".join(state["pinnedIds"])} if state["pinnedIds"] else {}
    query |= {"supernodes": json.dumps(state["supernodes"])} if state["supernodes"] else {}
    return f"http://localhost:{port}/index.html?{urlencode(query)}"


def _offered(path: Path, *, overwrite: bool) -> list[dict[str, Any]]:
    """The graphs that the page offers already; GraphError for some of another program, unless `overwrite`."""
    check_output(path, lambda file: True)
    if not path.exists():
        return []
    try:
        graphs = parse_json(read_text(path), path, _Offered)["graphs"]
    except GraphError:
        graphs = [{}]
    if not overwrite and not all(EXTRA in graph for graph in graphs):
        raise GraphError(f"{str(path)!r} offers graphs of another program: give another folder, or overwrite=True")
    return [graph for graph in graphs if graph]


def _feature_pages(graph: FeatureGraph, items: Iterable[Mapping[str, Any]]) -> Iterable[tuple[int, dict[str, Any]]]:
    """The data of each feature's panel, by the number the page knows it by; once where it is at several positions."""
    by_number = {item["feature"]: item[EXTRA]["id"] for item in items if EXTRA in item}
    for number, id in by_number.items():
        node = graph.node(id)
        if node.kind == "feature":
            yield number, feature_page(graph, node)


def feature_page(graph: FeatureGraph, node: Node) -> dict[str, Any]:
    """A feature as the viewers' pages show it: contexts, tokens it promotes, and how often and how strongly it is on.

    Of quantiles the page takes the activation at each hundredth of the tokens with one; between those that are known,
    zero and the largest activation it is linear.
    """
    attributes = node.attributes
    groups = [("Strongest contexts", attributes.get("contexts") or [])]
    for sample in attributes.get("samples") or []:
        groups.append((f"Activation {sample['low']:.3g} to {sample['high']:.3g}", sample["contexts"]))
    groups.append(("Random tokens", attributes.get("random") or []))
    largest = max((max(c["activations"], default=0.0) for _, contexts in groups for c in contexts), default=0.0)
    page: dict[str, Any] = {
        "transcoder_id": node.site,
        "index": node.feature,
        "examples_quantiles": [
            {"quantile_name": name, "examples": [_example(context) for context in contexts]}
            for name, contexts in groups
            if contexts
        ],
        "top_logits": _tokens(attributes.get("top_logits")),
        "bottom_logits": _tokens(attributes.get("bottom_logits")),
        "act_min": 0.0,
        "act_max": float(attributes.get("max_activation") or largest or 1.0),
        EXTRA: {"name": node.name, "label": describe(graph, node)},
    }
    if quantiles := attributes.get("quantiles"):
        ends = {0.0: 0.0, 1.0: max(page["act_max"], *(activation for _, activation in quantiles))}
        shares, activations = zip(*sorted((ends | dict(quantiles)).items()), strict=True)
        page["quantile_values"] = np.interp(PERCENTILES, shares, activations).tolist()
    if counts := (attributes.get("histogram") or {}).get("counts"):
        page["histogram"] = [float(count) for count in counts]
    if attributes.get("density") is not None:
        page["activation_frequency"] = attributes["density"]
    return page


def _example(context: Mapping[str, Any]) -> dict[str, Any]:
    activations = [float(value) for value in context["activations"]]
    peak = context.get("peak")
    return {
        "tokens": [visible(str(token)) for token in context["tokens"]],
        "tokens_acts_list": activations,
        "train_token_ind": int(np.argmax(activations)) if peak is None and activations else peak or 0,
        "is_repeated_datapoint": False,
    }


def _tokens(items: Sequence[Any] | None) -> list[str]:
    return [visible(str(item[0] if isinstance(item, list | tuple) else item)) for item in items or ()]
