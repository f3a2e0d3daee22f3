"""`report.html` of a run: the circuit, what it explains, its features, and what editing them does.

1. Read what the run folder holds (`circuits.report.files`).
2. Prepare what each section shows (`circuits.report.sections`); what is missing becomes a line with the command that
   makes it.
3. Lay it out by the templates beside this file, which escape every text. Everything is inlined (styles, drawings): the
   page needs no network, follows light and dark mode, and prints.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from circuits._results import format_interval
from circuits.attribution.node_effects import method_title
from circuits.debiasing.results import EXPLAINED, ShiftReport
from circuits.feature_pages import existing_links, read_index
from circuits.report.attention import attention_block
from circuits.report.files import RunFiles, read_run
from circuits.report.mechanism import passages, reading_table
from circuits.report.provenance import command_lines, provenance, sure
from circuits.report.sections import (
    card,
    curve_blocks,
    edit_block,
    key_figures,
    number,
    share,
    signed,
)
from circuits.report.site_table import site_table
from circuits.report.validity import validity_block
from graphs.classes import find_classes
from graphs.drawing.dot import to_svg
from graphs.drawing.style import describe, visible
from graphs.explorer import add_links
from graphs.feature_graph import OTHERS, FeatureGraph
from sae._files import atomic_write
from sae._run.outputs import check_output, has_mark

SECTIONS = [
    ("circuit", "The circuit"),
    ("faithfulness", "How faithful, and how sure"),
    ("validity", "How far to trust it"),
    ("attention", "Why attention looks there"),
    ("sites", "Site by site: the autoencoders, and the sum check"),
    ("features", "The features"),
    ("edits", "Edits"),
    ("provenance", "How to repeat it"),
]
"""Anchors, which name the templates, and headings."""
DRAWN_NODES, DRAWN_EDGES = 24, 72
"""What is drawn at most: every word is legible in a column of text, and on paper."""
CONTEXTS_SHOWN = 3
"""Contexts of a feature that stand open; the others unfold."""
FEATURES_SHOWN = 20
"""Features of an edit that are named."""
DRAWING_METADATA = ("tokens", "positions", "span_words", "last_span", "metric", "total_effect")
"""What the drawing reads; title and facts are on the page already."""


def write_report(
    run_folder: str | Path, *, out: str | Path | None = None, title: str | None = None, features: int = 30,
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write the report of a run as one HTML file.

    Args:
        run_folder: The folder of a run, or the circuit folder inside it.
        out: The file, `report.html` in the run folder by default.
        title: Heading of the page, the circuit's title or the folder's name by default.
        features: How many of the strongest nodes are described; the others are listed.
        overwrite: Whether a file is replaced that this program did not write.

    Returns:
        The file.

    Raises:
        UserError: If the folder holds nothing that a run leaves, a file in it is damaged, or the file to write is
            another program's.
    """
    run = read_run(run_folder)
    path = Path(out) if out is not None else run.folder / "report.html"
    check_output(path, has_mark(".html"), overwrite=overwrite)
    links = {"circuit": run.folder / "graph" / "circuit.html", "features": run.folder / "features" / "index.html"}
    page = _page(run, title, features, existing_links(path, links))
    with atomic_write(path) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="backslashreplace")
    if out is None:
        for other in links.values():
            add_links(other, {"report": f"../{path.name}"})
    return path


def report_html(
    run_folder: str | Path, *, title: str | None = None, features: int = 30, links: Mapping[str, str] | None = None
) -> str:
    """The report as text; links: addresses of the pages `circuit` and `features`. See `write_report`."""
    return _page(read_run(run_folder), title, features, links or {})


def _page(run: RunFiles, title: str | None, features: int, links: Mapping[str, str]) -> str:
    metadata = run.graph.metadata if run.graph else {}
    values = {
        "title": title or metadata.get("title") or run.folder.resolve().name,
        "pages": set((read_index(run.folder, metadata.get("saes_fingerprint")) or {}).get("features", ())),
        "links": links,
    }
    return _environment().get_template("page.html.j2").render(_values(run, features=features), **values)


@cache
def _environment() -> Environment:
    """The templates, compiled once."""
    environment = Environment(
        loader=PackageLoader(__package__), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    filters = (describe, number, share, signed, visible)
    environment.filters |= {function.__name__: function for function in filters}
    return environment


def _values(run: RunFiles, *, features: int) -> dict[str, Any]:
    """The values that the templates name; features: how many nodes are described."""
    metadata = run.graph.metadata if run.graph else {}
    all_nodes = run.graph.nodes() if run.graph else []
    nodes = sorted((node for node in all_nodes if node.kind != "metric"), key=lambda node: -abs(node.effect))
    method = (metadata.get("options") or {}).get("method", "")
    classes = find_classes(run.graph) if run.graph else None
    by_size = sorted(run.edits, key=lambda name: (len(run.edits[name].features), name))
    return {
        "run": run,
        "metadata": metadata,
        "date": datetime.date.today().isoformat(),
        "sections": SECTIONS,
        "figures": key_figures(run),
        "kinds": {kind: sum(node.kind == kind for node in nodes) for kind in ("feature", *OTHERS)},
        "method": method_title(method),
        "drawing": drawing(run.graph) if run.graph else "",
        "drawn_nodes": DRAWN_NODES,
        "drawn_edges": DRAWN_EDGES,
        "classes": classes,
        "reading": reading_table(run.graph, classes) if run.graph else ([], []),
        "passages": passages(run.graph) if run.graph else [],
        "sure": sure(run),
        "site_table": site_table(run),
        "validity": validity_block(run),
        "attention": attention_block(run),
        "n_nodes": len(nodes),
        "curves": curve_blocks(run),
        "cards": [card(run.graph, node) for node in nodes[:features]] if run.graph else [],
        "described": any(node.attributes.get("contexts") for node in nodes[:features]),
        "weaker": nodes[features:],
        "contexts_shown": CONTEXTS_SHOWN,
        "edits": [edit_block(name, run.edits[name]) for name in by_size],
        "shifts": [shift_block(run.shifts[name]) for name in run.shifts],
        "features_shown": FEATURES_SHOWN,
        "facts": provenance(run),
        "commands": command_lines(run.config, run.folder),
    }


def shift_block(report: ShiftReport) -> dict[str, Any]:
    """A debiased probe: heading, a row a probe with what was done, and the features that were ablated."""
    groups = list(report.scores[0].by_group)
    rows = []
    for score in report.scores:
        interval = format_interval(score.intended_interval, 2)
        cells = [number(score.spurious, 2), number(score.worst_group, 2)]
        cells += [number(score.by_group[group], 2) for group in groups]
        rows.append((score, EXPLAINED.get(score.name, ""), number(score.intended, 2), interval, cells))
    columns = ["spurious", "worst group", *(group.replace("_", ", ") for group in groups)]
    return {"report": report, "columns": columns, "rows": rows}


def drawing(graph: FeatureGraph) -> Markup:
    """The graph as an inline SVG element, without the title and facts that the page has already."""
    plain = graph.subgraph(graph.graph)
    plain.metadata = {key: value for key, value in graph.metadata.items() if key in DRAWING_METADATA}
    return Markup(to_svg(plain, nodes=DRAWN_NODES, edges=DRAWN_EDGES, portrait=True))
