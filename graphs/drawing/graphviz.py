"""DOT text to SVG, PNG or PDF bytes through pygraphviz, the same on every machine.

1. Graphviz runs in a Python process of its own: fontconfig takes its settings from the environment, and the C libraries
   write remarks to standard error, neither of which a library may touch in the process that uses it.
2. Graphviz looks for fonts through fontconfig, and a bare machine has none: text would become empty boxes. matplotlib
   ships DejaVu Sans, so its folder is added to the system's.
3. SVGs are finished here: full descriptions, and lines centred for whatever font the viewer has.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from xml.etree import ElementTree

from graphs.errors import GraphError

logger = logging.getLogger(__name__)

RESOLUTION = 200
"""Dots per inch of a PNG; lowered for drawings that would exceed MAX_PIXELS on a side."""
MAX_PIXELS = 12_000

FAMILY = "Helvetica Neue,Helvetica,Arial,DejaVu Sans,sans-serif"
"""Fonts of an SVG, the first that the viewer has; boxes are sized for the last and widest."""

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"

_FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "/Library/Fonts", "/System/Library/Fonts")

_PROGRAM = """
import sys
kind, program, resolution, *sys.path = sys.argv[1:]
from pygraphviz import AGraph
graph = AGraph(string=sys.stdin.buffer.read().decode())
graph.graph_attr["dpi"] = resolution
sys.stdout.buffer.write(graph.draw(format=kind, prog=program))
"""
"""What the other process runs: DOT in, a drawing out. It is given the paths, so that it skips looking for them."""


@dataclass(frozen=True)
class Detail:
    """Additions to an SVG element that Graphviz writes."""

    title: str
    """The text that a viewer shows when the mouse rests on the element."""
    centre: float | None = None
    """Where its lines of text are centred; Graphviz places them by the widths of its own font."""


def run_graphviz(source: str, kind: str, *, size: float, details: Mapping[str, Detail], program: str = "nop2") -> bytes:
    """Render DOT text as `kind`: svg, png or pdf.

    size: the longer side in points, which bounds the resolution of a png; details: those of SVG elements, by their id;
    program: that of Graphviz which lays it out, by default the one that keeps the positions in the text.
    """
    resolution = max(36, min(RESOLUTION, int(MAX_PIXELS * 72 / size))) if kind == "png" else 72
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-S", "-c", _PROGRAM, kind, program, str(resolution), *sys.path]
        environment = {**os.environ, **_fonts(Path(folder))}
        done = subprocess.run(command, input=source.encode(), capture_output=True, env=environment, check=False)
    lines = done.stderr.decode(errors="replace").splitlines()
    remarks = [line for line in lines if line.strip() and not line.startswith("Fontconfig warning")]
    if done.returncode:
        raise GraphError(
            f"Graphviz could not draw the graph: {remarks[-1] if remarks else f'status {done.returncode}'}"
        )
    if remarks:
        logger.warning("Graphviz: %s%s", remarks[0], f" (and {len(remarks) - 1} more lines)" if remarks[1:] else "")
    return _finished(done.stdout, details) if kind == "svg" else done.stdout


def _fonts(folder: Path) -> dict[str, str]:
    """Environment that points fontconfig to the system's fonts and matplotlib's, unless the user has set it up."""
    matplotlib = importlib.util.find_spec("matplotlib")
    if "FONTCONFIG_FILE" in os.environ or matplotlib is None or matplotlib.origin is None:
        return {}
    fonts = [*_FONT_FOLDERS, str(Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf")]
    listed = "".join(f"<dir>{escape(path)}</dir>" for path in fonts)
    settings = folder / "fonts.conf"
    settings.write_text(
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
        f'{listed}<dir prefix="xdg">fonts</dir><cachedir prefix="xdg">fontconfig</cachedir></fontconfig>'
    )
    return {"FONTCONFIG_FILE": str(settings)}


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
            xs = [float(x) for x in re.findall(r"(-?[\d.]+),-?[\d.]+", shape.get("d") or shape.get("points") or "")]
            return (min(xs) + max(xs)) / 2 - (detail.centre or 0.0)
    return 0.0
