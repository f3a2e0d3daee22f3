"""Progress of long computations on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE = "{desc}: {percentage:.0f} % ({n_fmt} of {total_fmt}) in {elapsed}, {rate_fmt}{postfix}"


class ProgressBar(tqdm):  # type: ignore[type-arg]
    """tqdm's bar; without a terminal nothing is redrawn, and every tenth of the work is one line."""

    disable: bool

    def __init__(self, *args: Any, **options: Any) -> None:
        self._redraws = sys.stderr.isatty()
        self._tenths = 0
        super().__init__(*args, **options if self._redraws else {"bar_format": LINE, **options})

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or write a line if another tenth of the work is done."""
        if self._redraws:
            super().display(msg, pos)
        elif self.total and (tenths := int(10 * self.n / self.total)) > self._tenths:
            self._tenths = tenths
            self.fp.write(f"{self}\n")

    def close(self) -> None:
        """End the bar, or write the last line."""
        if not self._redraws and not self.disable:
            self.display()
            self.disable = True
            self._decr_instances(self)
        super().close()
