"""`report.html` of a run: the circuit, what it explains, its features, and what editing them does.

1. Read what the run folder holds: `circuit/circuit.json` and the curves beside it, `edits/*.json`, `saes/`.
2. Write a section for each; for what is missing, one line with the command that makes it.
3. Everything is inlined (styles, drawings): the page needs no network, follows light and dark mode, and prints.
"""

from __future__ import annotations

import datetime
import logging
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from circuits.attribution import METHOD_NAMES
from circuits.circuit import PARTIAL_FOLDER, circuit_folder
from circuits.circuit_files import check_metadata
from circuits.editing.results import EditReport
from circuits.report.curves import faithfulness_section
from circuits.report.edits import edits_section, headline_edit
from circuits.report.features import features_section
from circuits.report.files import Curves, EdgeCurve, MaskCurves, SaeFile
from circuits.report.markup import Html, missing, number, section, share, signed, text
from graphs.drawing.dot import to_svg
from graphs.feature_graph import FeatureGraph
from graphs.pruning import by_top_nodes
from graphs.sharing import shared
from sae._files import atomic_write, check_type, read_json
from sae.autoencoder import CONFIG_FILE
from sae.errors import UserError
from sae.formats.locate import sae_folders
from sae.model.sites import Site

log = logging.getLogger(__name__)

DRAWN_NODES = 120
"""Nodes beyond which only the strongest are drawn; the circuit itself may hold more."""


@dataclass(frozen=True)
class RunFiles:
    """What a run folder holds."""

    folder: Path
    """The run folder."""
    graph: FeatureGraph | None
    """The pruned circuit."""
    faithfulness: dict[str, Any] | None
    """Curves over circuit sizes."""
    edge_faithfulness: dict[str, Any] | None
    """Curves over numbers of edges."""
    mask: dict[str, Any] | None
    """Curves of a learned mask beside those of the effects."""
    edits: dict[str, EditReport]
    """Edits by the name of their file."""
    saes: list[dict[str, Any]]
    """Configs of the autoencoders."""


def read_run(run_folder: str | Path) -> RunFiles:
    """Everything of a run that the report shows; `UserError` if there is nothing at all."""
    folder = Path(run_folder)
    if folder.name == "circuit" and (folder / "circuit.json").is_file():
        folder = folder.parent
    circuit = folder / "circuit" / "circuit.json"

    if not circuit.is_file() and (circuit.parent / PARTIAL_FOLDER).is_dir():
        circuit_folder(folder)  # says how an interrupted discovery goes on
    graph = _graph(circuit) if circuit.is_file() else None

    def known(name: str, schema: Any) -> dict[str, Any] | None:
        path = folder / "circuit" / name
        data = read_json(path) if path.is_file() else None
        return check_type(data, schema, path) if data is not None and _is_of(graph, data, path) else None

    run = RunFiles(
        folder=folder,
        graph=graph,
        faithfulness=known("faithfulness.json", Curves),
        edge_faithfulness=known("edge_faithfulness.json", EdgeCurve),
        mask=known("mask.json", MaskCurves),
        edits={
            path.stem: EditReport.load(path)
            for path in sorted((folder / "edits").glob("*.json"))
            if _is_of(graph, read_json(path), path)
        },
        saes=[read_json(path / CONFIG_FILE, SaeFile) for path in sae_folders(folder)] if folder.is_dir() else [],
    )
    if run.graph is None and run.faithfulness is None and not run.edits and not run.saes:
        raise UserError(f"nothing to report in {str(folder)!r}: give the folder of a run (sfc discover --out RUN)")
    return run


def _graph(path: Path) -> FeatureGraph:
    """The pruned circuit, with metadata that can be shown and without the folders its paths are in."""
    graph = FeatureGraph.load(path)
    check_metadata(graph.metadata, path, circuit=False)
    graph.metadata = shared(graph.metadata)
    return graph


def _is_of(graph: FeatureGraph | None, data: dict[str, Any], path: Path) -> bool:
    """Whether a result is of the circuit that is here now; a warning names one that says it is of another."""
    made_with = data.get("made_with")
    circuit = made_with.get("circuit") if isinstance(made_with, dict) else None
    if graph is None or circuit in (None, graph.metadata.get("digest")):
        return True
    log.warning("%s is of another circuit than the one that is here now, and is left out", path)
    return False


def write_report(
    run_folder: str | Path, *, out: str | Path | None = None, title: str | None = None, features: int = 30
) -> Path:
    """Write `report.html` into the run folder (or to `out`) and return its path.

    title: heading of the page; features: how many of the strongest nodes are described.
    """
    run = read_run(run_folder)
    path = Path(out) if out is not None else run.folder / "report.html"
    title = title or (run.graph.metadata.get("title") if run.graph else None) or run.folder.resolve().name
    sections = [
        _circuit_section(run),
        faithfulness_section(run.faithfulness, run.edge_faithfulness, run.mask),
        features_section(run.graph, limit=features),
        edits_section(run.edits),
        _check_section(run.graph),
        _provenance_section(run),
    ]
    template = Template((Path(__file__).parent / "template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=text(title),
        deck=_deck(run),
        figures=_key_figures(run),
        contents="".join(f'<a href="#{part.id}">{part.title}</a>' for part in sections),
        sections="\n".join(part.html for part in sections),
        date=datetime.date.today().isoformat(),
    )
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------ head


def _deck(run: RunFiles) -> str:
    """One sentence under the title: what was explained, on what model, by which method."""
    if run.graph is None:
        return "Sparse autoencoders without a circuit yet."
    metadata = run.graph.metadata
    features = sum(node.kind == "feature" for node in run.graph.nodes())
    errors = sum(node.kind == "error" for node in run.graph.nodes())
    method = METHOD_NAMES.get(_options(metadata).get("method", ""), _options(metadata).get("method", ""))
    parts = [f"A sparse feature circuit of <b>{features}</b> features and <b>{errors}</b> error nodes"]
    if metadata.get("model"):
        parts.append(f"in <b>{text(metadata['model'])}</b>")
    if metadata.get("n_examples"):
        parts.append(f"from <b>{text(metadata['n_examples'])}</b> prompts")
    if metadata.get("prompts"):
        parts.append(f"of <b>{text(metadata['prompts'])}</b>")
    return " ".join(parts) + (f", found by {text(method)}." if method else ".")


def _options(metadata: dict[str, Any]) -> dict[str, Any]:
    return metadata.get("options") or {}


def _key_figures(run: RunFiles) -> str:
    """The four numbers a reader wants first."""
    figures: list[tuple[str, str, str]] = []
    metadata = run.graph.metadata if run.graph else {}
    if metadata.get("m_clean") is not None:
        is_logit = _options(metadata).get("metric", "logit_difference") == "logit_difference"
        sign, name = (-1, "logit difference") if is_logit else (1, "metric")
        clean, patch = sign * metadata["m_clean"], metadata.get("m_patch")
        note = f"to {signed(sign * patch)} on the patch prompts" if patch is not None else "on the clean prompts"
        figures.append((signed(clean), name, note))
    if metadata.get("accuracy") is not None:
        figures.append((share(metadata["accuracy"]), "accuracy", "of the model on the clean prompts"))
    if run.faithfulness:
        figures.append(_faithfulness_figure(run.faithfulness))
    if run.edits:
        figures.append(headline_edit(run.edits))
    return "".join(
        f'<div class="figure"><b>{text(value)}</b><span>{text(label)}</span><small>{text(note)}</small></div>'
        for value, label, note in figures
    )


def _faithfulness_figure(data: dict[str, Any]) -> tuple[str, str, str]:
    """The smallest circuit that explains 80 %, or the best one measured."""
    rows = [(size, f) for size, f in zip(data["sizes"], data["faithfulness"], strict=True) if f is not None]
    rows = [row for row in rows if row[0] != data.get("n_nodes")] or rows  # all nodes are no circuit
    reached = [row for row in rows if row[1] >= 0.8]
    size, f = reached[0] if reached else max(rows, key=lambda row: row[1], default=(data["sizes"][-1], None))
    return number(f), "faithfulness", f"with {size} nodes from {data.get('start_site', 'the start')} on"


# ------------------------------------------------------------------------------------------ sections


def _circuit_section(run: RunFiles) -> Html:
    if run.graph is None:
        return section("circuit", "The circuit", missing("No circuit yet.", "sfc discover --out RUN"))
    nodes = [node for node in run.graph.nodes() if node.kind != "metric"]
    graph = by_top_nodes(run.graph, DRAWN_NODES) if len(nodes) > DRAWN_NODES else run.graph
    note = f"The {DRAWN_NODES} strongest of {len(nodes)} nodes are drawn. " if len(nodes) > DRAWN_NODES else ""
    caption = (
        f"{note}Each row is a site of the model, from the embedding at the bottom to the metric at the top. A box is a "
        "feature, a triangle what the autoencoder misses. Colour is the effect of the node's change from clean to "
        "patch on the metric; a line's width is how much of it passes from one node to the next. Nodes lead to their "
        "description below."
    )
    return section(
        "circuit", "The circuit", f'<figure class="drawing">{drawing(graph)}</figure><p class="cap">{caption}</p>'
    )


def drawing(graph: FeatureGraph) -> str:
    """The graph as an inline SVG element, without the title and facts that the page has already."""
    plain = graph.subgraph(graph.graph)
    plain.metadata = {
        key: value
        for key, value in graph.metadata.items()
        if key in ("tokens", "positions", "span_words", "metric", "total_effect")
    }
    return to_svg(plain, nodes=DRAWN_NODES)


def _check_section(graph: FeatureGraph | None) -> Html:
    check = graph.metadata.get("completeness") if graph else None
    if not check or not check.get("sites"):
        return section("check", "Do the effects add up?", missing("No circuit yet.", "sfc discover --out RUN"))
    lead = (
        "At every site the effects of all features and of the error must add up to what patching the whole site does "
        "to the metric. The gap is the estimate's own error, as a share of the total effect: "
        f"{share(check['mean_residual'], 2)} on average, {share(check['worst_residual'], 2)} at worst "
        f"({text(check['worst_site'])})."
    )
    rows = "".join(
        f'<tr><td class="name">{text(site)}</td><td>{signed(row["sum_of_effects"], 3)}</td>'
        f"<td>{signed(row['measured'], 3)}</td><td>{share(row['residual'], 2)}</td></tr>"
        for site, row in check["sites"].items()
    )
    table = (
        '<table class="numbers"><thead><tr><th class="name">site</th><th>sum of effects</th><th>measured</th>'
        f"<th>gap</th></tr></thead><tbody>{rows}</tbody></table>"
    )
    return section("check", "Do the effects add up?", f'<p class="lead">{lead}</p>{table}')


NOT_FACTS = ("completeness", "sites", "tokens", "templates", "title", "schema_version", "span_words", "need_spans")
FACT_NAMES = {
    "n_examples": "prompts used",
    "n_positions": "longest prompt, tokens",
    "n_nodes": "nodes with an effect",
    "m_clean": "metric, clean",
    "m_patch": "metric, patch",
    "rejected": "prompts skipped",
    "positions": "spans",
}


def _provenance_section(run: RunFiles) -> Html:
    facts: list[tuple[str, Any]] = []
    metadata = run.graph.metadata if run.graph else {}
    for key, value in metadata.items():
        if key not in NOT_FACTS and value not in ({}, [], None):
            facts.append((FACT_NAMES.get(key, key.replace("_", " ")), value))
    if run.saes:
        kinds = sorted({_sae_text(config) for config in run.saes})
        sites = ", ".join(map(str, sorted(Site.parse(config["site"]) for config in run.saes)))
        facts.append(("autoencoders", f"{len(run.saes)}: {'; '.join(kinds)} at {sites}"))
    rows = "".join(f"<dt>{text(name)}</dt><dd>{_plain(value)}</dd>" for name, value in facts)
    return section("provenance", "How it was made", f'<dl class="facts">{rows}</dl>')


def _sae_text(config: dict[str, Any]) -> str:
    k = f", k = {config['k']}" if config.get("k") else ""
    return f"{config.get('architecture')} with {config.get('n_features')} features{k}"


def _plain(value: Any) -> str:
    """A JSON value as a person writes it."""
    if isinstance(value, dict):
        return ", ".join(f"{text(str(key).replace('_', ' '))} <b>{_plain(item)}</b>" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, float):
        return f"{value:.4g}".replace("-", "−")
    return "none" if value is None else text(str(value))
