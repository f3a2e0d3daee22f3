"""What measurements of faithfulness found, as records: for JSON, for the terminal and as pictures.

CPR and CMD (Mueller et al. 2025, MIB) are the areas under faithfulness f and under |1 - f| over the share of nodes
kept, by the trapezoid rule through the values measured, that with all nodes among them. f of no node is 0 by
definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from circuits.faithfulness.optimal_ablation import Gain
from circuits.faithfulness.plots import Curve, plot_curves
from circuits.uncertainty.bootstrap import COVERAGE
from sae._tables import aligned


@dataclass(frozen=True)
class Intervals:
    """95 % intervals over the prompts, each [low, high] (`circuits.uncertainty.bootstrap`)."""

    faithfulness: list[list[float]]
    """One a size."""
    completeness: list[list[float]]
    """One a size."""
    cpr: list[float]
    """Of the area under faithfulness."""
    cmd: list[float]
    """Of the area under its distance from 1."""


@dataclass(frozen=True)
class NodeFaithfulness:
    """Curves over circuit sizes; `random` holds one curve a draw."""

    sizes: list[int]
    """Nodes kept; the last is all of them."""
    faithfulness: list[float]
    """(m(C) - m(0)) / (m(M) - m(0)) for the strongest nodes of each size."""
    completeness: list[float]
    """The same for everything but these nodes."""
    random: list[list[float]]
    """Faithfulness of random circuits: one list over sizes per draw."""
    m_model: float
    """Mean metric of the whole model, m(M)."""
    m_empty: float
    """Mean metric with every node ablated, m(0)."""
    ablation: str
    """What ablated nodes became."""
    start_site: str
    """First ablated site."""
    n_nodes: int
    """Nodes with an effect, from the start site on."""
    n_prompts: int
    """Prompts measured."""
    n_uncovered: int
    """Prompts left out because no reference prompt has their template."""
    errors: str = "nodes"
    """What was done with the errors."""
    intervals: Intervals | None = None
    """How far the curves depend on the prompts; None where not computed, or where prompts are too few."""
    drawn: str = ""
    """What the intervals draw anew, `100 prompts drawn by their 17 templates`."""
    gain: Gain | None = None
    """What optimal constants gain over means on these prompts; None for other ablations."""

    @property
    def cpr(self) -> float:
        """Area under faithfulness over the share of nodes kept (higher is better)."""
        return cpr(self.faithfulness, self.sizes, self.n_nodes)

    @property
    def cmd(self) -> float:
        """Area under |1 - faithfulness| over the share of nodes kept (lower is better)."""
        return cmd(self.faithfulness, self.sizes, self.n_nodes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema_version": 1, **asdict(self), "cpr": self.cpr, "cmd": self.cmd}

    def table(self) -> str:
        """A table for the terminal: one row a size."""
        known = self.intervals
        gap = [""] if known else []
        rows = [["nodes", "faithfulness", *gap, "random", "completeness", *gap]]
        for row, size in enumerate(self.sizes):
            f, c = ([span(bounds[row])] for bounds in (known.faithfulness, known.completeness)) if known else ([], [])
            f, c = [f"{self.faithfulness[row]:.3f}", *f], [f"{self.completeness[row]:.3f}", *c]
            rows.append([str(size), *f, drawn_range([curve[row] for curve in self.random]), *c])
        return aligned(rows, text_columns=0)

    def areas(self) -> str:
        """CPR and CMD in a line."""
        spans = ["", ""] if self.intervals is None else [f" {span(self.intervals.cpr)}", f" {span(self.intervals.cmd)}"]
        return (
            f"area under faithfulness (CPR) {self.cpr:.3f}{spans[0]}, "
            f"under its distance from 1 (CMD) {self.cmd:.3f}{spans[1]}"
        )

    def evidence(self) -> str:
        """What the intervals are, or why there are none, in a line."""
        if self.intervals is None:
            return f"no intervals over {self.drawn}: none were asked for, or there are too few to tell"
        return f"95 % bootstrap intervals over {self.drawn}; {COVERAGE}"

    def plot(self, path: str | Path) -> Path:
        """Faithfulness, completeness and random circuits over size, as .svg, .png or .pdf."""
        known = self.intervals
        return plot_curves(
            path,
            self.sizes,
            [
                Curve("circuit (faithfulness)", self.faithfulness, known.faithfulness if known else ()),
                Curve("all but the circuit (completeness)", self.completeness, known.completeness if known else ()),
            ],
            xlabel=f"nodes kept, from {self.start_site} on",
            levels=(0, 1),
            random=self.random,
            random_label="random circuits",
        )


@dataclass(frozen=True)
class EdgeFaithfulness:
    """A curve over the number of edges; `random` holds one curve a draw."""

    sizes: list[int]
    """Edges kept."""
    faithfulness: list[float]
    """(m(E) - m(0)) / (m(M) - m(0)) for the strongest edges of each size."""
    random: list[list[float]]
    """Faithfulness of random edges: one list over sizes per draw."""
    all_joined: float
    """Faithfulness with every node joined to every earlier one, weight or not: that of the nodes."""
    n_edges: int
    """Edges with a weight, from the start site on."""
    n_nodes: int
    """Nodes between which edges were computed."""
    m_model: float
    """Mean metric of the whole model, m(M)."""
    m_empty: float
    """Mean metric without any edge, m(0)."""
    ablation: str
    """What the inputs without an edge became."""
    start_site: str
    """First site of the circuit."""
    n_prompts: int
    """Prompts measured."""
    intervals: list[list[float]]
    """95 % bootstrap interval over the prompts of each size's faithfulness; empty where not computed."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema_version": 1, **asdict(self)}

    def table(self) -> str:
        """A table for the terminal: one row a size."""
        rows = [["edges", "faithfulness", *([""] if self.intervals else []), "random"]]
        for row, size in enumerate(self.sizes):
            bounds = [span(self.intervals[row])] if self.intervals else []
            beside = drawn_range([curve[row] for curve in self.random])
            rows.append([str(size), f"{self.faithfulness[row]:.3f}", *bounds, beside])
        end = f"{self.n_edges} edges have a weight; with all {self.n_nodes} nodes joined {self.all_joined:.3f}"
        return f"{aligned(rows, text_columns=0)}\n{end}"

    def plot(self, path: str | Path) -> Path:
        """Faithfulness of the strongest and of random edges over their number, as .svg, .png or .pdf."""
        return plot_curves(
            path,
            self.sizes,
            [Curve("strongest edges", self.faithfulness, self.intervals)],
            xlabel=f"edges kept, from {self.start_site} on",
            levels=(0,),
            random=self.random,
            random_label="random edges",
            dashed=("all nodes joined", self.all_joined),
        )


def area(values: Sequence[float], sizes: Sequence[int], n_nodes: int, height) -> float:
    """Trapezoid area under height(value) over size / n_nodes, from the first size to the last, which must be all nodes:
    what was not measured has no value.
    """
    if sizes[-1] != n_nodes:
        raise ValueError(f"the largest size is {sizes[-1]}: the area needs the value measured with all {n_nodes} nodes")
    points = [(size / n_nodes, height(value)) for size, value in zip(sizes, values, strict=True)]
    return sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def cpr(faithfulness: Sequence[float], sizes: Sequence[int], n_nodes: int) -> float:
    """Area under faithfulness over the share of nodes kept, from no node (0) to all (1)."""
    return area([0.0, *faithfulness], [0, *sizes], n_nodes, lambda f: f)


def cmd(faithfulness: Sequence[float], sizes: Sequence[int], n_nodes: int) -> float:
    """Area under |1 - faithfulness| over the share of nodes kept."""
    return area([0.0, *faithfulness], [0, *sizes], n_nodes, lambda f: abs(1 - f))


def span(bounds: Sequence[float]) -> str:
    """An interval as `[0.512, 0.634]`."""
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def drawn_range(values: Sequence[float]) -> str:
    """What random sets had, as `-0.02 to +0.11`; empty where none was drawn."""
    return f"{signed(min(values))} to {signed(max(values))}" if values else ""


def signed(value: float) -> str:
    """Two digits with a sign; what rounds to zero has none."""
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"
