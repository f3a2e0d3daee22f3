"""The comparison of node methods as a table, for JSON, for the terminal and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pandas as pd
from matplotlib.figure import Figure

from circuits._results import format_interval, format_number, format_table
from circuits.comparison.options import CompareOptions
from circuits.faithfulness.results import NodeFaithfulness
from sae._frames import Result
from sae._plotting import COLOURS, PALE, RULE, quiet, save_figure
from sae.neurons import DICTIONARIES, MLP_NEURONS, NEURONS

NOISING, MEAN = "noising", "mean"
"""Exact quantities: one node set to its patch value in the clean run, and the mean of that and of denoising."""
LEVELS = (0.8, 0.95)
"""Shares of the behaviour for which the number of nodes is told."""
BASELINES = ("random", "activation-difference")
LINES = {NEURONS: "--", MLP_NEURONS: "-."}
"""Line styles of the plot by dictionary; features have whole lines."""
OF_CURVE = ("sizes", "faithfulness", "completeness", "n_nodes", "cpr", "cmd", "m_model", "m_empty")
"""Fields of a curve that go to JSON."""


@dataclass(frozen=True)
class Agreement:
    """Correlation with one exact quantity."""

    pearson: float
    """Linear correlation over the sampled features."""
    spearman: float
    """Correlation of their ranks."""
    errors: float | None
    """Linear correlation over the error nodes; None where there are fewer than three."""


@dataclass(frozen=True)
class MethodScore:
    """One row of the comparison."""

    method: str
    """Node method."""
    dictionary: str
    """saes or neurons."""
    estimates: str | None
    """Exact quantity the method estimates: noising, mean (of noising and denoising) or None."""
    agreement: dict[str, Agreement]
    """Correlations by exact quantity; empty where nothing was sampled."""
    residual: float | None
    """Completeness residual, mean over sites; None for learned masks."""
    path_nodes: float | None
    """Gradient evaluations per prompt and site where the method goes site by site."""
    nodes_for: dict[str, float | None]
    """Nodes needed for faithfulness .8 and .95; None where it is not reached."""
    seconds: float
    """Time for the effects on all training prompts; for learned masks also for those they start from."""
    peak_bytes: int
    """Tensors alive at once on a batch of `MEMORY_PROMPTS` prompts."""
    curve: NodeFaithfulness
    """Faithfulness and completeness on the held-out prompts."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        curve, intervals = self.curve.to_dict(), self.curve.intervals
        row = {name: value for name, value in asdict(self).items() if name != "curve"}
        row["intervals"] = None if intervals is None else {"cpr": intervals.cpr, "cmd": intervals.cmd}
        return row | {name: curve[name] for name in OF_CURVE}

    @property
    def name(self) -> str:
        """`ig`, `ig (neurons)`"""
        return f"{self.method} ({self.dictionary})" if self.dictionary in DICTIONARIES else self.method

    def at_size(self, curve: Sequence[float], size: int) -> float | None:
        """The value of a curve at a size; None where the dictionary has fewer nodes."""
        return curve[self.curve.sizes.index(size)] if size in self.curve.sizes else None


@dataclass(frozen=True)
class Comparison(Result):
    """All methods beside each other."""

    rows: list[MethodScore]
    """One a method and dictionary."""
    options: CompareOptions
    """How it was made."""
    n_train: int
    """Prompts the circuits were found on."""
    n_test: int
    """Held-out prompts they were scored on."""
    sampled: dict[str, int] = field(default_factory=dict)
    """Features patched exactly, by dictionary."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "schema_version": 1,
            "options": asdict(self.options),
            "n_train": self.n_train,
            "n_test": self.n_test,
            "sampled": self.sampled,
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_frame(self) -> pd.DataFrame:
        """One row a method and dictionary: areas, nodes needed, correlations with exact effects, residual, and cost."""
        rows = []
        for row in self.rows:
            intervals = row.curve.intervals
            bounds: dict[str, list[float]] = {"cpr": intervals.cpr, "cmd": intervals.cmd} if intervals else {}
            columns: dict[str, Any] = {"method": row.method, "dictionary": row.dictionary}
            columns |= {"cpr": row.curve.cpr, "cmd": row.curve.cmd}
            columns |= {
                f"{name}_{end}": pair[n] for name, pair in bounds.items() for n, end in enumerate(("low", "high"))
            }
            columns |= {f"nodes_for_{level}": n for level, n in row.nodes_for.items()}
            for quantity, agreement in row.agreement.items():
                columns |= {f"{name}_{quantity}": value for name, value in asdict(agreement).items()}
            names = ("residual", "path_nodes", "seconds", "peak_bytes")
            rows.append({**columns, "n_nodes": row.curve.n_nodes, **{name: getattr(row, name) for name in names}})
        return pd.DataFrame(rows)

    def text(self) -> str:
        """Three tables: the circuits, what is left without them, and the estimates with what they cost."""
        drawn = ", ".join(f"{n} features of the {name}" for name, n in self.sampled.items() if n)
        sample, first = f" ({drawn})" if drawn else "", self.rows[0].curve
        return "\n".join(
            [
                f"faithfulness of the strongest nodes on {self.n_test} held-out prompts, found on {self.n_train}; "
                f"nodes from {first.start_site} on, others ablated by {first.ablation}; "
                "n(x): nodes needed for faithfulness x, of: all that have an effect",
                format_table(self._circuits()),
                "",
                "what is left without them (completeness)",
                format_table(self._at_sizes("completeness")),
                "",
                f"correlation with exact patching{sample}: noising, and the mean of noising and denoising; * what the "
                "method estimates; errors: the same for the error nodes; nodes: gradients taken a prompt and site; "
                "seconds: on all prompts, of masks with what they start from; MB: tensors alive on a batch of prompts",
                format_table(self._estimates()),
            ]
        )

    def _at_sizes(self, curve: Literal["faithfulness", "completeness"]) -> pd.DataFrame:
        sizes = self.options.circuit_sizes
        cells = [[row.at_size(getattr(row.curve, curve), size) for size in sizes] for row in self.rows]
        texts = [[format_number(value, 2) for value in values] for values in cells]
        return pd.DataFrame(texts, index=[row.name for row in self.rows], columns=list(map(str, sizes)))

    def _circuits(self) -> pd.DataFrame:
        table = self._at_sizes("faithfulness")
        for name in ("cpr", "cmd"):
            table[name.upper()] = [f"{getattr(row.curve, name):.3f}" for row in self.rows]
            bounds = [getattr(row.curve.intervals, name, None) for row in self.rows]
            texts = ["" if pair is None else format_interval(pair, 2) for pair in bounds]
            table.insert(len(table.columns), "95 %", texts, allow_duplicates=True)
        for level in LEVELS:
            table[f"n({level})"] = [format_number(row.nodes_for[str(level)], 0) for row in self.rows]
        return table.assign(of=[str(row.curve.n_nodes) for row in self.rows])

    def _estimates(self) -> pd.DataFrame:
        columns = ["estimates", "r noising", "rank", "r mean", "rank", "errors", "residual", "nodes", "seconds", "MB"]
        rows = []
        for row in self.rows:
            cells = [row.estimates or "-"]
            for quantity in (NOISING, MEAN):
                agreement, mark = row.agreement.get(quantity), "*" if row.estimates == quantity else " "
                measured = (agreement.pearson, agreement.spearman) if agreement else ()
                cells += [f"{value:.3f}{mark}" for value in measured] or ["-", "-"]
            estimated = row.agreement.get(row.estimates or NOISING)
            cells += [format_number(estimated.errors if estimated else None, 2), format_number(row.residual, 4)]
            cells += [format_number(row.path_nodes, 1), f"{row.seconds:.1f}", f"{row.peak_bytes / 1e6:.1f}"]
            rows.append(cells)
        return pd.DataFrame(rows, index=[row.name for row in self.rows], columns=columns)

    def plot(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Faithfulness and completeness over circuit size, one line a method, as .svg, .png or .pdf; `overwrite` as in
        `save`.
        """
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        colours = iter(COLOURS * len(self.rows))
        colour_of: dict[str, str] = {}
        for row in self.rows:
            if row.method not in colour_of:
                colour_of[row.method] = PALE if row.method in BASELINES else next(colours)
            style = {
                "color": colour_of[row.method],
                "ls": ":" if row.method == "random" else LINES.get(row.dictionary, "-"),
                "lw": 1.2 if row.method in BASELINES else 1.8,
            }
            left.plot(row.curve.sizes, row.curve.faithfulness, label=row.name, **style)
            right.plot(row.curve.sizes, row.curve.completeness, **style)
        for axes, title in ((left, "only these nodes (faithfulness)"), (right, "all but these nodes (completeness)")):
            for level in (0, 1):
                axes.axhline(level, color=RULE, lw=1, zorder=0)
            axes.set(xscale="log", xlabel="strongest nodes", title=title)
            axes.xaxis.set_major_formatter("{x:.0f}")
            quiet(axes, size=10)
        low, high = left.get_ylim()
        left.set(ylabel="share of the behaviour", ylim=(max(low, -0.5), min(high, 1.5)))
        figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", frameon=False)
        return save_figure(figure, path, overwrite=overwrite)
