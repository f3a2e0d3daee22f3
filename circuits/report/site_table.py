"""Site by site: how well the autoencoder stands for the model, and whether the effects add up to patching the site.

Unexplained variance, 1 - EV, stands on a logarithmic axis: what tells good autoencoders apart is how close they come
to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from circuits.report.files import RunFiles
from sae.model.sites import Site

AXIS = 150.0
"""Width of the axis in points of the picture."""
DECADES = (-4, 0)
"""Powers of ten that the axis has at most; what is beyond stands at its end."""


@dataclass(frozen=True)
class SiteRow:
    """One site."""

    site: str
    """Its name."""
    quality: dict[str, Any] | None
    """Its entry in evaluation.json."""
    check: dict[str, Any] | None
    """Its entry of the sum check."""


@dataclass(frozen=True)
class SiteTable:
    """All sites, in forward order."""

    rows: list[SiteRow]
    """One a site."""
    evaluation: dict[str, Any] | None
    """evaluation.json, as far as it is read."""
    check: dict[str, Any] | None
    """The sum check."""
    first: int
    """The lowest power of ten on the axis."""

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Places on the axis and what stands at them."""
        powers = range(self.first, DECADES[1] + 1)
        return [(self.x(10.0**power), f"{10.0**power:g}".removeprefix("0")) for power in powers]

    def x(self, value: float | None) -> float:
        """The x of a share of unexplained variance on the axis."""
        if value is None:
            return AXIS
        power = min(max(math.log10(max(value, 1e-12)), self.first), DECADES[1])
        return 8 + (AXIS - 16) * (power - self.first) / (DECADES[1] - self.first)


def site_table(run: RunFiles) -> SiteTable | None:
    """The table; None where neither was measured."""
    check = (run.graph.metadata if run.graph else {}).get("completeness") or None
    evaluation = run.evaluation
    qualities = evaluation["sites"] if evaluation else {}
    checks = check["sites"] if check else {}
    names = sorted({*qualities, *checks}, key=Site.parse)
    if not names:
        return None
    rows = [SiteRow(name, qualities.get(name), checks.get(name)) for name in names]
    unexplained = [1 - ev for quality in qualities.values() if (ev := quality["explained_variance"]) is not None]
    smallest = min((value for value in unexplained if value > 0), default=0.1)
    first = max(DECADES[0], min(-1, math.floor(math.log10(smallest))))
    return SiteTable(rows, evaluation, check, first)
