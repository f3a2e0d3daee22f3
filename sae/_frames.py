"""The base of all results: a data frame, a file, a table for the terminal and one for a notebook."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae._files import write_json
from sae._run.outputs import check_output, like

if TYPE_CHECKING:
    import pandas as pd


class Result:
    """Base of all results: `to_frame`, `to_dict`, `text`, `save`, and a table in a notebook."""

    def to_frame(self) -> pd.DataFrame:
        """The numbers as a pandas data frame."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; undefined numbers are None."""
        raise NotImplementedError

    def text(self) -> str:
        """The numbers as a table for the terminal."""
        return frame_text(self.to_frame())

    def save(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Write everything as JSON, in one step.

        Args:
            path: The file. An earlier result of this kind is replaced.
            overwrite: Whether any other file is replaced as well.

        Returns:
            The path.

        Raises:
            UserError: For a file of another kind, unless `overwrite`, or a link.
        """
        data = self.to_dict()
        check_output(path, like(data), overwrite=overwrite)
        write_json(path, data)
        return Path(path)

    def _repr_html_(self) -> str:
        return self.to_frame().to_html(border=0, float_format="{:.4g}".format, na_rep="")


def frame_text(frame: pd.DataFrame, digits: Mapping[str, int] | None = None) -> str:
    """A data frame for the terminal: text to the left, numbers to the right, a dash where one is undefined.

    digits: decimal places by column, three by default.
    """
    import pandas as pd

    columns: dict[str, list[str]] = {}
    for name, values in (frame.reset_index() if frame.index.name else frame).items():
        decimals = (digits or {}).get(str(name), 3)
        cells = [_cell(value, decimals) for value in values]
        if not pd.api.types.is_numeric_dtype(values):
            width = max(map(len, [str(name), *cells]))
            cells, name = [cell.ljust(width) for cell in cells], str(name).ljust(width)
        columns[str(name)] = cells
    first = next(iter(columns))
    shown = pd.DataFrame(columns).set_index(first).rename_axis(index=None, columns=first)
    return "\n".join(line.rstrip() for line in shown.to_string().splitlines())


def _cell(value: Any, decimals: int) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.{decimals}f}" if isinstance(value, float) else str(value)
