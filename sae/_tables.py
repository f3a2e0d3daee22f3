"""Tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence


def aligned(cells: Sequence[Sequence[str]], *, text_columns: int = 1) -> str:
    """Columns as wide as their widest cell, the first ones to the left and the numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        padded = [
            cell.ljust(width) if i < text_columns else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def number(value: float, digits: int = 3) -> str:
    """A number with so many digits; a dash where it is undefined."""
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
