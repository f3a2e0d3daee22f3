"""DOT text to SVG, PNG or PDF bytes through pygraphviz, the same on every machine.

Graphviz looks for fonts through fontconfig, and a bare machine has none: text would become empty boxes. matplotlib
ships DejaVu Sans, so its folder is added to the system's.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path

logger = logging.getLogger(__name__)

RESOLUTION = 200
"""Dots per inch of a PNG; lowered for drawings that would exceed MAX_PIXELS on a side."""
MAX_PIXELS = 12_000

FAMILY = "Helvetica Neue,Helvetica,Arial,DejaVu Sans,sans-serif"
"""Fonts of an SVG, the first that the viewer has; boxes are sized for the last and widest."""

_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts")


def draw(source: str, kind: str, *, titles: Mapping[str, str] | None = None) -> bytes:
    """Render DOT text that carries positions (`layout=nop2`) as `kind`: svg, png or pdf.

    `titles` maps the id of an SVG element to the text that a viewer shows when the mouse rests on it.
    """
    with _fonts(), _logged_stderr():
        import pygraphviz  # first: fontconfig reads its settings when Graphviz is first used

        graph = pygraphviz.AGraph(string=source)
        if kind == "png":
            graph.graph_attr["dpi"] = str(_resolution(graph.graph_attr["bb"]))
        data = graph.draw(format=kind, prog="nop2")
    return _with_titles(data.decode(), titles or {}).encode() if kind == "svg" else data


def _resolution(bounding_box: str) -> int:
    x0, y0, x1, y1 = map(float, bounding_box.split(","))
    return max(36, min(RESOLUTION, int(MAX_PIXELS * 72 / max(x1 - x0, y1 - y0, 1.0))))


def _with_titles(svg: str, titles: Mapping[str, str]) -> str:
    """Replace the names Graphviz puts in <title> by the full description of each node and edge."""

    def replace(match: re.Match[str]) -> str:
        opening, id = match.group(1), match.group(2)
        return f"{opening}\n<title>{escape(by_id[id], quote=False)}</title>" if id in by_id else match.group(0)

    by_id = {_attribute(id): text for id, text in titles.items()}
    svg = re.sub(r'(<g id="([^"]+)" class="(?:node|edge)">)\s*<title>.*?</title>', replace, svg, flags=re.DOTALL)
    svg = re.sub(r' xlink:title="[^"]*"', "", svg)
    return svg.replace(
        'font-family="DejaVu Sans"', 'font-family="Helvetica Neue,Helvetica,Arial,DejaVu Sans,sans-serif"'
    )


def _attribute(text: str) -> str:
    """The text as Graphviz writes it inside an attribute."""
    return escape(text).replace("&#x27;", "&#39;").replace("-", "&#45;")


@contextlib.contextmanager
def _fonts() -> Iterator[None]:
    """Point fontconfig to the system's fonts and matplotlib's, unless the user has set it up."""
    found = importlib.util.find_spec("matplotlib")
    if "FONTCONFIG_FILE" in os.environ or found is None or found.origin is None:
        yield
        return
    folders = [*_FONT_FOLDERS, str(Path(found.origin).parent / "mpl-data" / "fonts" / "ttf")]
    listed = "".join(f"<dir>{escape(folder)}</dir>" for folder in folders)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "fonts.conf"
        settings.write_text(
            '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
            f'{listed}<dir prefix="xdg">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>'
        )
        os.environ["FONTCONFIG_FILE"] = str(settings)
        try:
            yield
        finally:
            del os.environ["FONTCONFIG_FILE"]


@contextlib.contextmanager
def _logged_stderr() -> Iterator[None]:
    """Send what the C libraries write to standard error to the log, but for fontconfig's remarks on system files."""
    with tempfile.TemporaryFile() as captured:
        saved = os.dup(2)
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            captured.seek(0)
            for line in captured.read().decode(errors="replace").splitlines():
                if line.strip() and not line.startswith("Fontconfig warning"):
                    logger.warning("Graphviz: %s", line)
