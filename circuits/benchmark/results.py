"""Results of the suite of tasks: an entry a data set, site and size, as JSON, as a table and means by site."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from circuits.benchmark.absorption import Absorption
from circuits.benchmark.sparse_probing import Probing
from circuits.benchmark.spurious import Removal
from sae._files import without_nan
from sae._frames import Result, frame_text
from sae.evaluation.stability import Stability

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Perturbation:
    """TPP with n features ablated (`circuits.debiasing.targeted`)."""

    data: str
    """Data set."""
    site: str
    """Site."""
    n: int
    """Features ablated of each class."""
    score: float
    """Loss in accuracy of a class's probe, minus the mean loss of the other classes' probes."""
    interval: tuple[float, float]
    """95 % interval over test texts."""
    on_target: float
    """Mean loss of the own probe."""
    off_target: float
    """Mean loss of the others."""


@dataclass(frozen=True)
class SuiteReport(Result):
    """Scores of dictionaries on tasks."""

    position: str = ""
    """Token that probes read."""
    texts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By data set, texts learned from and tested on."""
    probing: list[Probing] = field(default_factory=list)
    """Sparse probing."""
    removal: list[Removal] = field(default_factory=list)
    """Spurious correlation removal, of data sets with a second label."""
    perturbation: list[Perturbation] = field(default_factory=list)
    """Targeted probe perturbation, of data sets with three classes or more."""
    absorption: list[Absorption] = field(default_factory=list)
    """Feature absorption, where the model tells first letters apart."""
    stability: list[Stability] = field(default_factory=list)
    """Stability of features over seeds."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Data sets and tasks that were left out, with the reason."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; undefined numbers are None."""
        return without_nan(asdict(self))

    def to_frame(self) -> pd.DataFrame:
        """One row a number: task, data set, site, size, score, and the ends of its interval."""
        import pandas as pd

        rows: list[tuple[Any, ...]] = []
        rows += [("probing", e.data, e.site, e.k, e.accuracy, *e.interval) for e in self.probing]
        rows += [("scr", e.data, e.site, e.n, e.score, *e.interval) for e in self.removal]
        rows += [("tpp", e.data, e.site, e.n, e.score, *e.interval) for e in self.perturbation]
        for e in self.absorption:
            rows.append(("full absorption", "first letters", e.site, None, e.full, *e.full_interval))
            rows.append(("absorbed fraction", "first letters", e.site, None, e.fraction, *e.fraction_interval))
        for s in self.stability:
            rows.append(("similarity", s.other, s.site, None, s.similarity, None, None))
            rows.append(("matched", s.other, s.site, None, s.matched, None, None))
        frame = pd.DataFrame(rows, columns=["task", "data", "site", "size", "score", "low", "high"])
        return frame.astype({"size": "Int64", "score": float, "low": float, "high": float})

    @property
    def sites(self) -> list[str]:
        """Sites that were measured, in forward order."""
        return list(dict.fromkeys(self.to_frame()["site"]))

    def means(self) -> pd.DataFrame:
        """A row a site, a column a task and size: means over data sets."""
        frame = self.to_frame()
        frame["column"] = frame["task"] + (" " + frame["size"].astype("string")).fillna("")
        table = frame.pivot_table(index="site", columns="column", values="score", aggfunc="mean", sort=False)
        if self.probing:
            dense = {e.site: [o.dense for o in self.probing if o.site == e.site] for e in self.probing}
            table.insert(0, "dense probe", [_mean(dense.get(site, [])) for site in table.index])
        return table.rename_axis(columns=None)

    def text(self) -> str:
        """Means over data sets by site, a table a task, and what was left out."""
        table = self.means() if self.to_frame().size else None
        lines = []
        for title, columns in HEADS.items():
            shown = [] if table is None else [name for name in table if str(name).startswith(columns)]
            if table is not None and shown:
                lines += [title, frame_text(table[shown].dropna(how="all").rename_axis("site")), ""]
        if self.texts:
            learned, tested = (sum(n[half] for n in self.texts.values()) for half in (0, 1))
            lines.append(f"{len(self.texts)} data sets, {learned:,} texts learned from and {tested:,} tested on")
        return "\n".join([*lines, *(f"left out: {name}: {why}" for name, why in self.left_out.items())]).strip()


HEADS = {
    "sparse probing: accuracy by features read, beside a probe of the whole activation": ("dense probe", "probing"),
    "spurious correlation removal (SCR) by features ablated": ("scr",),
    "targeted probe perturbation (TPP) by features ablated": ("tpp",),
    "feature absorption on first letters": ("full absorption", "absorbed fraction"),
    "features found again with another seed: mean max cosine, share matched": ("similarity", "matched"),
}
"""Titles of the tables, and how the names of their columns begin."""


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
