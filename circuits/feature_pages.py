"""Feature pages of a run: their data in `features/`, and the page that shows them beside the circuit.

    features/index.json      what they were made with, and a line a feature
    features/resid_3.jsonl   everything that the page of a feature shows, a line a feature
    features/circuit.json    what only a circuit has: each feature's mean activation by case and span, and its largest
                             activation on every prompt
    features/index.html      all of it on one page
    features/automata.svg    features that make one another come next, where they were looked for

The data are of the SAEs (their fingerprint is in `index.json`), effects and edges of the circuit that is there when the
page is written. Explorer and report read the same files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from typing_extensions import NotRequired, TypedDict

from circuits.circuit import Circuit
from circuits.discovery.activity import mean_activations, prompt_peaks
from circuits.discovery.attention.stored import with_attention
from circuits.labels import Label
from circuits.prompts.dataset import PromptSet
from graphs.drawing.automata import Machine, Way, draw_automata
from graphs.explorer import explore_features
from graphs.feature_graph import FeatureGraph, feature_node
from graphs.schema import AttributesFile
from sae._files import atomic_write, check_type, parse_json, read_json, to_json, write_json
from sae.features.automata import Automata
from sae.features.page import SCHEMA_VERSION, FeaturePage
from sae.model.sites import Site

FOLDER = "features"
INDEX_FILE = "index.json"
CIRCUIT_FILE = "circuit.json"
PAGE_FILE = "index.html"
HEAVY = ("samples", "random")
"""Entries of a record that explorer and report leave to the features' own page."""
SHORTENED = {"contexts": 6, "top_logits": 8, "bottom_logits": 8}
SIMILAR = 4
"""How much they take of other entries."""
DRAWN = 8
"""Automata in the picture."""
ON_A_PAGE = 2000
"""Features on one page at most, those of the circuit and then the most frequent."""


class IndexFile(TypedDict):
    """index.json, as far as it is read."""

    schema_version: int
    saes_fingerprint: NotRequired[str | None]
    title: NotRequired[str]
    text: NotRequired[str]
    n_tokens: NotRequired[int]
    features: NotRequired[list[str]]
    sites: list[str]
    all_sites: NotRequired[list[str]]


class CircuitFile(TypedDict):
    """circuit.json beside it."""

    features: dict[str, dict[str, Any]]


def write_site(folder: Path, site: Site, pages: Iterable[FeaturePage]) -> Path:
    """Write the pages of a site's features as JSON lines, in one step."""
    path = folder / f"{site}.jsonl"
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
        for page in pages:
            file.write(to_json({"schema_version": SCHEMA_VERSION, **page.to_dict()}) + "\n")
    return path


def tokens_read(path: Path) -> int:
    """How many tokens the pages of a site that `write_site` wrote are of."""
    with path.open(encoding="utf-8") as lines:
        return int(parse_json(next(lines), f"{path}, line 1", dict[str, Any])["n_tokens"])


def write_circuit_part(
    folder: Path, circuit: Circuit, prompts: PromptSet, features: Mapping[Site, Iterable[int]]
) -> None:
    """Measure the features on prompts of the circuit's task, and write `circuit.json`."""
    index = {site: torch.tensor(sorted(indices)) for site, indices in features.items()}
    arguments = (circuit.model, circuit.saes, prompts, index)
    by_case, peaks = mean_activations(*arguments), prompt_peaks(*arguments)
    entries = {name: {"by_case": by_case[name], "prompt_peaks": peaks[name]} for name in by_case}
    write_json(
        folder / CIRCUIT_FILE,
        {"schema_version": SCHEMA_VERSION, "digest": circuit.metadata.get("digest"), "features": entries},
    )


def read_index(run: str | Path, saes_fingerprint: str | None = None) -> dict[str, Any] | None:
    """The index of a run's feature pages; None where there are none, or where they are of other SAEs."""
    path = Path(run) / FOLDER / INDEX_FILE
    if not path.is_file():
        return None
    index = read_json(path, IndexFile)
    noted = index.get("saes_fingerprint")
    return None if saes_fingerprint and noted and noted != saes_fingerprint else index


def read_records(run: str | Path, names: Iterable[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, record) of every feature, or of those named, site by site; nothing where there are no pages."""
    folder, wanted = Path(run) / FOLDER, None if names is None else set(names)
    on_prompts: dict[str, Any] = {}
    if (folder / CIRCUIT_FILE).is_file():
        on_prompts = read_json(folder / CIRCUIT_FILE, CircuitFile)["features"]
    index = read_index(run)
    for site in index["sites"] if index else ():
        path = folder / f"{site}.jsonl"
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                record = parse_json(line, where, dict[str, Any])
                name = f"{record.pop('site', None)}/{record.pop('index', None)}"
                if wanted is None or name in wanted:
                    yield name, {**check_type(record, AttributesFile, where), **on_prompts.get(name, {})}


def with_pages(graph: FeatureGraph, run: str | Path, *, full: bool = False) -> FeatureGraph:
    """The graph with what the pages of its features hold, but for what is heavy unless `full`, as far as there are
    pages; and with what its features add to attention scores (`sfc attention`).
    """
    graph = with_attention(graph, Path(run) / "circuit")
    if read_index(run, graph.metadata.get("saes_fingerprint")) is None:
        return graph
    records = read_records(run, [node.name for node in graph.nodes()])
    by_name = {name: record if full else _short(record) for name, record in records}
    return graph.map_nodes(lambda node: replace(node, attributes={**node.attributes, **by_name.get(node.name, {})}))


def _short(record: Mapping[str, Any]) -> dict[str, Any]:
    light = {key: value for key, value in record.items() if key not in HEAVY}
    light |= {key: light[key][:n] for key, n in SHORTENED.items() if light.get(key)}
    similar = {kind: rows[:SIMILAR] for kind, rows in light.get("similar", {}).items()}
    return light | ({"similar": similar} if similar else {})


def write_page(run: str | Path, *, title: str | None = None) -> Path | None:
    """Write `features/index.html` from the data in a run folder; None where there are none."""
    run = Path(run)
    index, path = read_index(run), run / FOLDER / PAGE_FILE
    if index is None:
        return None
    has_circuit = (run / "circuit" / "circuit.json").is_file()
    circuit = Circuit.load(run) if has_circuit else None
    if circuit is not None and read_index(run, circuit.metadata.get("saes_fingerprint")) is None:
        circuit = None  # of other SAEs
    graph = with_attention(pages_graph(circuit, index, dict(read_records(run))), run / "circuit")
    heading = title or index.get("title") or run.resolve().name
    links = existing_links(path, {"circuit": run / "graph" / "circuit.html", "report": run / "report.html"})
    about = f"{index.get('n_tokens', 0):,} tokens of {Path(str(index.get('text', 'a text'))).name}"
    return explore_features(graph, path, title=heading, about=about, links=links)


def pages_graph(
    circuit: Circuit | None, index: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]
) -> FeatureGraph:
    """The circuit's nodes with everything that is known of their features, and features that are not in it."""
    if circuit is None:
        graph = FeatureGraph(index.get("all_sites") or index["sites"])
    else:
        n_with_edges = sum(len(nodes) for nodes in circuit.edge_nodes.values())
        attributes = {name: {**circuit.features.get(name, {}), **record} for name, record in records.items()}
        graph = circuit.graph(nodes=n_with_edges or 100, attributes={**circuit.features, **attributes})
    in_circuit = {node.name for node in graph.nodes()}
    others = sorted((name for name in records if name not in in_circuit), key=lambda n: -records[n].get("density", 0))
    for name in others[: max(0, ON_A_PAGE - len(in_circuit))]:
        site, _, feature = name.partition("/")
        graph.add_node(feature_node(site, int(feature), effect=0.0, **{**records[name], "outside": True}))
    return graph.map_nodes(lambda node: replace(node, attributes={**node.attributes}))


def existing_links(page: Path, files: Mapping[str, Path]) -> dict[str, str]:
    """Addresses of the files that exist, relative to the folder of a page."""
    folder = page.parent.resolve()
    return {
        name: Path(os.path.relpath(path.resolve(), folder)).as_posix() for name, path in files.items() if path.is_file()
    }


def draw_automata_of(automata: Automata, path: Path, labels: Mapping[str, Label]) -> Path:
    """Draw the first automata, states by their labels, else by the tokens that they are on."""
    machines = []
    for number, automaton in enumerate(automata.automata[:DRAWN], start=1):
        states = {}
        for state in automaton.states:
            name = f"{automaton.site}/{state.feature}"
            states[name] = (labels[name]["label"] if name in labels else "", automata.words(state.token_ids))
        ways = []
        for way in automaton.transitions:
            source, target = f"{automaton.site}/{way.source}", f"{automaton.site}/{way.target}"
            words = automata.words(way.token_ids)
            about = (
                f"{source} raises {target}: by {way.raised:.2f} ± {1.96 * way.raised_error:.2f} of its maximum in the "
            )
            about += (
                f"text ({way.count} tokens), by {way.effect:.2f} ± {1.96 * way.effect_error:.2f} through the model's "
            )
            ways.append(Way(source, target, way.effect, f"{way.effect:.2f}  {words}", f"{about}predictions: {words}"))
        machines.append(Machine(f"{number}  {automaton.kind} at {automaton.site}", states, ways))
    return draw_automata(machines, path, overwrite=True)
