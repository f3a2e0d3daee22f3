"""Helpers of all plots: colours that tell apart in print and to the colour-blind, quiet axes, whole files."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae._files import atomic_write
from sae._run.outputs import MARK, check_output, has_mark
from sae.errors import UserError

COLOURS = ("#1b6ca8", "#c1440e", "#2e8b57", "#8e44ad", "#b8860b", "#008b8b", "#a0522d", "#c2185b", "#556b2f")
PALE = "#8a8a8a"
RULE = "0.85"
SUFFIXES = (".png", ".svg", ".pdf")


def save_figure(figure: Figure, path: str | Path, *, dpi: int = 160, overwrite: bool = False) -> Path:
    """Write a figure as .png, .svg or .pdf, the same bytes for the same figure; `overwrite` as in `check_output`."""
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise UserError(f"unknown picture format {path.suffix[1:]!r}: allowed are png, svg and pdf")
    check_output(path, has_mark(path.suffix), overwrite=overwrite)
    about = {
        ".svg": {"Creator": MARK, "Date": None},
        ".pdf": {"Creator": MARK, "CreationDate": None},
        ".png": {"Software": MARK},
    }[path.suffix]
    with atomic_write(path) as temporary, rc_context({"svg.hashsalt": path.name}):
        figure.savefig(temporary, format=path.suffix[1:], dpi=dpi, metadata=about)
    return path


def quiet(axes: Axes, *, size: float = 8) -> None:
    """No frame above and to the right, small labels."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=size)
