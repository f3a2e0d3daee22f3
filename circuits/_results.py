"""Tables, numbers and intervals for the terminal."""

from __future__ import annotations

import math

import pandas as pd


def format_table(table: pd.DataFrame) -> str:
    """A table of texts for the terminal: names of rows, where it has any, to the left, everything else to the right."""
    if isinstance(table.index, pd.RangeIndex):
        apart = table.map(" {}".format)  # pandas leaves one space between columns
        apart.isetitem(0, table.iloc[:, 0])
        header = [table.columns[0], *map(" {}".format, table.columns[1:])]
        return "\n".join(line.rstrip() for line in apart.to_string(index=False, header=header).splitlines())
    return "\n".join(line.rstrip() for line in table.to_string().splitlines())


def format_number(value: float | None, digits: int = 3) -> str:
    """A number with so many digits; a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def format_interval(bounds: tuple[float, float] | list[float], digits: int = 3) -> str:
    """An interval as `[0.512, 0.634]`; a dash where there is none (NaN)."""
    if any(math.isnan(bound) for bound in bounds):
        return "-"
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
