"""The few pieces of HTML that every section of the report uses."""

from __future__ import annotations

from html import escape
from typing import NamedTuple


class Html(NamedTuple):
    """A section of the page."""

    id: str
    """Its anchor."""
    title: str
    """Its heading."""
    html: str
    """All of it, heading included."""


def text(value: object) -> str:
    """Anything as text that is safe inside HTML and its attributes."""
    return escape(str(value))


def section(id: str, title: str, body: str) -> Html:
    """A section with its heading."""
    return Html(id, title, f'<section id="{id}"><h2>{title}</h2>{body}</section>')


def missing(sentence: str, command: str) -> str:
    """What stands in the place of a section whose file does not exist yet."""
    return f'<p class="missing">{sentence} Make it with <code>{text(command)}</code></p>'


def number(value: float | None, digits: int = 2) -> str:
    """`0.97`, `−0.04`, and never `−0.00`; a dash where there is none."""
    if value is None:
        return "–"
    shown = f"{value:.{digits}f}"
    return shown.replace("-", "" if float(shown) == 0 else "−")


def signed(value: float, digits: int = 2) -> str:
    """`+1.87`, `−0.04`, `0.00`."""
    shown = number(value, digits)
    return f"+{shown}" if float(f"{value:.{digits}f}") > 0 else shown


def share(value: float, digits: int = 0) -> str:
    """`97 %`."""
    return f"{number(100 * value, digits)} %"
