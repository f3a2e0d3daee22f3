"""One HTML file in which a circuit can be explored: no server, no network, no other file.

1. `_data.py` gathers the graph and its layouts, compressed and in base64: no text in it can leave its element.
2. The page is `template.html.j2` with `explorer.css`, that data, `viewer.js`, and as text `charts.js`, which the viewer
   runs when it draws the first chart. esbuild makes both scripts of the TypeScript in `src/` (`npm ci && npm run build`
   in this folder); they are committed, so that nobody else needs node.
3. In a notebook `widget.js` shows the same page in a frame.
4. Labels and supernodes that a reader makes live in the browser's local storage and can be saved to files; labels on a
   page that `sfc serve` shows are written into `labels.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup

from graphs._files import read_text, write_text
from graphs._outputs import check_output, has_mark
from graphs.errors import GraphError
from graphs.explorer._data import packed, page_data, unpacked, with_links
from graphs.explorer.widget import make_widget
from graphs.feature_graph import FeatureGraph

if TYPE_CHECKING:
    from anywidget import AnyWidget


def explore(
    graph: FeatureGraph,
    path: str | Path | None = None,
    *,
    title: str | None = None,
    compare_with: FeatureGraph | None = None,
    links: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path | AnyWidget:
    """Write a page in which the graph can be explored: filters, search, feature contexts, labels, supernodes.

    Without a path, the same as a widget in a notebook, whose `selected`, `labels` and `groups` are in step with Python
    (`graphs.explorer.widget`).

    Args:
        graph: The graph, with at least one node.
        path: An .html file, which needs no other file and no network; None for a widget.
        title: Heading of the page, `graph.metadata["title"]` by default.
        compare_with: A second graph; the page then tells what is in the first, in both and in the second alone.
        links: Addresses of other pages of the run, relative to this one: `features`, `report`.
        overwrite: Whether a file is replaced that this program did not write.

    Returns:
        The path, or the widget.

    Raises:
        GraphError: For another extension, a graph without nodes, a file that cannot be written or is another program's.
    """
    if path is None:
        return explorer_widget(graph, title=title, compare_with=compare_with)
    path = _html(path)
    check_output(path, has_mark(".html"), overwrite=overwrite)
    write_text(path, explorer_html(graph, title=title, compare_with=compare_with, links=links))
    return path


def explore_features(
    graph: FeatureGraph,
    path: str | Path,
    *,
    title: str,
    about: str = "",
    links: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a page with everything that is known of each feature of a graph: a list to choose from, and its contexts.

    Args:
        graph: The graph; attributes of its nodes as `sae.feature_pages` gives them, `outside` for features that are in
            no circuit.
        path: An .html file, which needs no other file and no network.
        title: Heading of the page.
        about: What the numbers were counted on.
        links: Addresses of other pages of the run, relative to this one: `circuit`, `report`.
        overwrite: Whether a file is replaced that this program did not write.

    Returns:
        The path.

    Raises:
        GraphError: For another extension, or a file that cannot be written or is another program's.
    """
    path = _html(path)
    check_output(path, has_mark(".html"), overwrite=overwrite)
    data = page_data(graph, title, layouts=False) | {"page": "features", "about": about, "links": dict(links or {})}
    write_text(path, _page(title, data))
    return path


def add_links(path: str | Path, links: Mapping[str, str]) -> None:
    """Let a page that this program wrote lead to other pages too; files of others stay as they are."""
    path = Path(path)
    if not path.is_file() or not has_mark(".html")(path):
        return
    html = read_text(path)
    if not links.items() <= unpacked(html).get("links", {}).items():
        write_text(path, with_links(html, links))


def _html(path: str | Path) -> Path:
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise GraphError(f"cannot write the explorer into {path.name!r}: its extension must be .html")
    return path


def explorer_html(
    graph: FeatureGraph,
    *,
    title: str | None = None,
    compare_with: FeatureGraph | None = None,
    links: Mapping[str, str] | None = None,
) -> str:
    """The explorer as text."""
    if len(graph) == 0:
        raise GraphError("the graph has no nodes: there is nothing to explore")
    title = str(title if title is not None else graph.metadata.get("title") or "Feature circuit")
    return _page(title, page_data(graph, title, compare_with) | {"links": dict(links or {})})


@cache
def _template() -> Template:
    environment = Environment(loader=PackageLoader(__name__, ""), autoescape=True, keep_trailing_newline=True)
    return environment.get_template("template.html.j2")


def _page(title: str, data: Mapping[str, Any]) -> str:
    """The page with its data."""
    return _template().render(
        title=title.encode("utf-8", "replace").decode("utf-8"),
        style=Markup(_asset("explorer.css")),
        data=Markup(packed(data)),
        charts=Markup(_asset("charts.js")),
        script=Markup(_asset("viewer.js")),
    )


def explorer_widget(
    graph: FeatureGraph, *, title: str | None = None, compare_with: FeatureGraph | None = None,
    names: Callable[[list[str]], list[str]] = list,
) -> AnyWidget:  # fmt: skip
    """The explorer as a widget; see `graphs.explorer.widget`."""
    page = explorer_html(graph, title=title, compare_with=compare_with)
    return make_widget(page, _asset("widget.js"), names=names)


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
