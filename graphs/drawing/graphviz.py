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
from dataclasses import dataclass
from html import escape
from pathlib import Path
from xml.etree import ElementTree

logger = logging.getLogger(__name__)

RESOLUTION = 200
"""Dots per inch of a PNG; lowered for drawings that would exceed MAX_PIXELS on a side."""
MAX_PIXELS = 12_000

FAMILY = "Helvetica Neue,Helvetica,Arial,DejaVu Sans,sans-serif"
"""Fonts of an SVG, the first that the viewer has; boxes are sized for the last and widest."""

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts")


@dataclass(frozen=True)
class Detail:
    """What an SVG element gets beside what Graphviz writes."""

    title: str
    """The text that a viewer shows when the mouse rests on the element."""
    centre: float | None = None
    """Where its lines of text are centred; Graphviz places them by the widths of its own font."""


def draw(source: str, kind: str, *, details: Mapping[str, Detail] | None = None) -> bytes:
    """Render DOT text that carries positions (`layout=nop2`) as `kind`: svg, png or pdf.

    `details` are those of SVG elements, by their id.
    """
    with _fonts(), _logged_stderr():
        import pygraphviz  # first: fontconfig reads its settings when Graphviz is first used

        graph = pygraphviz.AGraph(string=source)
        if kind == "png":
            graph.graph_attr["dpi"] = str(_resolution(graph.graph_attr["bb"]))
        data = graph.draw(format=kind, prog="nop2")
    return _finished(data, details or {}) if kind == "svg" else data


def _resolution(bounding_box: str) -> int:
    x0, y0, x1, y1 = map(float, bounding_box.split(","))
    return max(36, min(RESOLUTION, int(MAX_PIXELS * 72 / max(x1 - x0, y1 - y0, 1.0))))


def _finished(svg: bytes, details: Mapping[str, Detail]) -> bytes:
    """Give elements their full description, centre their lines for any font, and drop what only Graphviz needs."""
    for prefix, uri in (("", SVG[1:-1]), ("xlink", XLINK[1:-1])):
        ElementTree.register_namespace(prefix, uri)
    root = ElementTree.fromstring(svg)
    groups = [(group, details[group.get("id", "")]) for group in root.iter(f"{SVG}g") if group.get("id") in details]
    shift = _shift(groups)
    for group, detail in groups:
        title = group.find(f"{SVG}title")
        if title is not None:
            title.text = detail.title
        for parent in list(group.iter()) if detail.centre is not None else ():
            for text in parent.findall(f"{SVG}text"):
                text.set("text-anchor", "middle")
                text.set("x", f"{(detail.centre or 0.0) + shift:.2f}")
                if not (text.text or "").strip():
                    parent.remove(text)
    for element in root.iter():
        element.attrib.pop(f"{XLINK}title", None)
        if element.get("font-family"):
            element.set("font-family", FAMILY)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)


def _shift(groups: list[tuple[ElementTree.Element, Detail]]) -> float:
    """How far Graphviz moved the drawing sideways: where the first node's box is, against where it was put."""
    for group, detail in groups:
        for shape in [*group.iter(f"{SVG}path"), *group.iter(f"{SVG}polygon")] if group.get("class") == "node" else ():
            places = [float(x) for x in re.findall(r"(-?[\d.]+),-?[\d.]+", shape.get("d") or shape.get("points") or "")]
            return (min(places) + max(places)) / 2 - (detail.centre or 0.0)
    return 0.0


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
            lines = captured.read().decode(errors="replace").splitlines()
            said = [line for line in lines if line.strip() and not line.startswith("Fontconfig warning")]
            if said:
                logger.warning("Graphviz: %s%s", said[0], f" (and {len(said) - 1} more lines)" if said[1:] else "")
