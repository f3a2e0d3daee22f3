"""One HTML file in which a circuit can be explored: no server, no network, no other file.

1. The graph is embedded as JSON, escaped so that no text in it can end the script element.
2. `template.html.j2`, `explorer.css` and the scripts beside this file are put together; the scripts run in the order of
   `SCRIPTS`: the data and its filters, the layered layout of `graphs/drawing/layout.py`, the drawing, highlighting and
   zoom, the panel, the controls.
3. Labels that a reader edits live in the browser's local storage and can be downloaded as an annotations file.
"""

from __future__ import annotations

import hashlib
import json
import math
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from graphs._files import write_text
from graphs.drawing.style import DIVERGING, NEGATIVE_EDGE, POSITIVE_EDGE, position_name
from graphs.errors import GraphError
from graphs.feature_graph import FeatureGraph
from graphs.sharing import shared

SCRIPTS = ("model.js", "layout.js", "drawing.js", "view.js", "panel.js", "controls.js")


def explore(graph: FeatureGraph, path: str | Path, *, title: str | None = None) -> Path:
    """Write a page in which the graph can be explored: filters, highlighting, feature contexts, labels.

    Args:
        graph: The graph, with at least one node.
        path: An .html file, which needs no other file and no network.
        title: Heading of the page, `graph.metadata["title"]` by default.

    Returns:
        The path.

    Raises:
        GraphError: For another extension, a graph without nodes, or a file that cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise GraphError(f"cannot write the explorer into {path.name!r}: its extension must be .html")
    write_text(path, explorer_html(graph, title=title))
    return path


def explorer_html(graph: FeatureGraph, *, title: str | None = None) -> str:
    """The explorer as text."""
    if len(graph) == 0:
        raise GraphError("the graph has no nodes: there is nothing to explore")
    title = str(title if title is not None else graph.metadata.get("title") or "Feature circuit")
    page = Environment(loader=PackageLoader(__name__, ""), autoescape=True, keep_trailing_newline=True)
    return page.get_template("template.html.j2").render(
        title=title,
        style=Markup(_asset("explorer.css")),
        data=Markup(embedded_json(_data(graph, title))),
        script=Markup("\n".join(_asset(name) for name in SCRIPTS)),
    )


def embedded_json(data: Any) -> str:
    """JSON that may stand inside a <script> element: no `<`, `>`, `&` or line separator appears in it literally."""
    text = json.dumps(_plain(data), ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates have no place in a file


def _plain(value: Any) -> Any:
    """The value as JSON has it: what is not a finite number becomes null, what has no form in JSON its text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int) else str(value)


def _data(graph: FeatureGraph, title: str) -> dict[str, Any]:
    """What the page needs, with edges as [source, target, weight, interval] by the nodes' places."""
    nodes = graph.nodes()
    place = {node.id: index for index, node in enumerate(nodes)}
    keep = ("id", "site", "feature", "kind", "position", "effect", "label", "attributes")
    return {
        "title": title,
        "key": hashlib.sha256("\n".join([title, *place]).encode("utf-8", "replace")).hexdigest()[:16],
        "metadata": {k: v for k, v in shared(graph.metadata).items() if k not in ("title", "tokens", "positions")},
        "sites": graph.sites,
        "positions": [[position, position_name(graph, position)] for position in graph.positions],
        "nodes": [{"name": node.name, **{key: getattr(node, key) for key in keep}} for node in nodes],
        "edges": [[place[edge.source], place[edge.target], edge.weight, edge.interval] for edge in graph.edges()],
        "colours": {"diverging": DIVERGING, "negative": NEGATIVE_EDGE, "positive": POSITIVE_EDGE},
    }


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
