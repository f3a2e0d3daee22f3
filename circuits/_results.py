"""What every result of an analysis can do: be a table, a text, a file, and show itself in a notebook."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from sae._files import write_json


class Result:
    """A result with one table of numbers."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON, with the keys that files have."""
        raise NotImplementedError

    def to_frame(self) -> pd.DataFrame:
        """The numbers as a table."""
        raise NotImplementedError

    def text(self) -> str:
        """What the command prints."""
        raise NotImplementedError

    def save(self, path: str | Path) -> Path:
        """Write it as JSON, in one step. Returns the path."""
        write_json(path, self.to_dict())
        return Path(path)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(border=0, float_format="{:.3f}".format, na_rep="")


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
    """An interval as `[0.512, 0.634]`."""
    return f"[{bounds[0]:.{digits}f}, {bounds[1]:.{digits}f}]"
