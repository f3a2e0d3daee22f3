"""What a sweep found: a row a config and site, as JSON and as tables; `sae.evaluation.sweep_plots` draws it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from sae._files import without_nan
from sae._tables import aligned, number


@dataclass(frozen=True)
class SweepRow:
    """One dictionary."""

    name: str
    """Its config, and the folder of its run."""
    architecture: str
    """Architecture."""
    features: int
    """Features of the dictionary."""
    k: int
    """Active features that were asked for."""
    seed: int
    """Seed."""
    site: str
    """Site."""
    l0: float
    """Mean active features a token."""
    explained_variance: float
    """1 − Σ‖x − x̂‖² / Σ‖x − x̄‖²."""
    ce_recovered: float
    """(CE_zero − CE) / (CE_zero − CE_model) with this site alone spliced."""
    kl: float
    """Mean KL divergence from the model's predictions, in nats."""
    dead_fraction: float
    """Share of the features that never fired on the text."""


@dataclass(frozen=True)
class SweepResults:
    """What `evaluate_sweep` measured."""

    rows: tuple[SweepRow, ...]
    """One a config and site."""
    spliced: dict[str, dict[str, float]]
    """By config, with all sites spliced: ce, ce_recovered, kl."""
    ce_model: float
    """Cross-entropy of the model itself."""
    n_tokens: int
    """Tokens measured."""
    text: str
    """Text measured on."""
    start: int
    """First document of it."""
    seen: bool
    """Whether the dictionaries were trained on it."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values; undefined numbers are None."""
        return {"schema_version": 1, **without_nan(json.loads(json.dumps(asdict(self))))}

    @property
    def sites(self) -> list[str]:
        """Sites in the order of the forward pass."""
        return list(dict.fromkeys(row.site for row in self.rows))

    def lines(self, site: str | None = None) -> dict[tuple[str, int], dict[int, list[SweepRow]]]:
        """Rows by architecture and width, then by k; of one site or of all."""
        found: dict[tuple[str, int], dict[int, list[SweepRow]]] = {}
        for row in self.rows:
            if site in (None, row.site):
                found.setdefault((row.architecture, row.features), {}).setdefault(row.k, []).append(row)
        return found

    def summary(self) -> str:
        """A line for each architecture, width and k: means over sites and seeds."""
        cells = [["architecture", "features", "k", "L0", "EV", "CE recovered", "dead", "all spliced"]]
        for (name, width), by_k in self.lines().items():
            for k, rows in by_k.items():
                together = mean(self.spliced[config]["ce_recovered"] for config in {row.name for row in rows})
                cells.append([name, str(width), str(k), *_means(rows), number(together)])
        sites = f"{len(self.sites)} sites" if len(self.sites) > 1 else self.sites[0]
        head = f"means over {sites} and all seeds, {self.n_tokens:,} tokens of {self._where()}"
        return f"{head}\n{aligned(cells)}"

    def table(self) -> str:
        """The same for each site."""
        cells = [["site", "architecture", "features", "k", "L0", "EV", "CE recovered", "dead"]]
        for site in self.sites:
            for (name, width), by_k in self.lines(site).items():
                cells += [[site, name, str(width), str(k), *_means(rows)] for k, rows in by_k.items()]
        return aligned(cells, text_columns=2)

    def _where(self) -> str:
        after = f" from document {self.start:,} on" if self.start else ""
        return f"{self.text}{after}{', which they were trained on' if self.seen else ''}"


def _means(rows: Sequence[SweepRow]) -> list[str]:
    """L0, explained variance, CE recovered and dead fraction, means of what is defined."""
    columns = [[getattr(row, name) for row in rows] for name in ("l0", "explained_variance", "ce_recovered")]
    columns.append([row.dead_fraction for row in rows])
    return [number(mean(column), 1 if i == 0 else 3) for i, column in enumerate(columns)]


def mean(values: Iterable[float]) -> float:
    """Mean of the defined values."""
    defined = [value for value in values if not math.isnan(value)]
    return fmean(defined) if defined else math.nan
