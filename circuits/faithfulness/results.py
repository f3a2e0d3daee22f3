"""Faithfulness of nodes and of edges over sizes, as tables, for JSON, for the terminal and as pictures.

CPR and CMD (Mueller et al. 2025, MIB) are the areas under faithfulness f and under |1 - f| over the share of nodes
kept, by the trapezoid rule through the values measured, that with all nodes among them. f of no node is 0 by
definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.integrate import trapezoid

from circuits._results import format_interval, format_table
from circuits.faithfulness.optimal_ablation import Gain
from circuits.faithfulness.plots import Curve, plot_curves
from circuits.uncertainty.bootstrap import COVERAGE
from sae._frames import Result

ERRORS_TEXT = {"nodes": "", "keep": ", all errors left in", "ablate": ", all errors ablated"}


@dataclass(frozen=True)
class Intervals:
    """95 % intervals over the prompts, each [low, high] (`circuits.uncertainty.bootstrap`)."""

    faithfulness: list[list[float]]
    """One a size."""
    completeness: list[list[float]]
    """One a size."""
    cpr: list[float]
    """Interval of the area under faithfulness."""
    cmd: list[float]
    """Interval of the area under its distance from 1."""


@dataclass(frozen=True)
class Faithfulness(Result):
    """A curve over the number of nodes, or of edges, that are kept."""

    sizes: list[int]
    """How many are kept; the last number of nodes is all of them."""
    faithfulness: list[float]
    """(m(C) - m(0)) / (m(M) - m(0)) for the strongest of each size."""
    random: list[list[float]]
    """The same for as many drawn at random: one list over sizes a draw."""
    m_model: float
    """Mean metric of the whole model, m(M)."""
    m_empty: float
    """Mean metric with none kept, m(0)."""
    ablation: str
    """What ablated nodes, or inputs without an edge, became."""
    start_site: str
    """First site that is ablated."""
    n_nodes: int
    """Nodes with an effect from the start site on, or those between which edges were computed."""
    n_prompts: int
    """Prompts measured."""
    n_uncovered: int
    """Prompts left out because no reference prompt has their template."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema_version": 1, **asdict(self)}

    @property
    def left_out(self) -> str:
        """Words for the prompts that were left out, if there are any."""
        text = f" ({self.n_uncovered} without a reference prompt of their template left out)"
        return text if self.n_uncovered else ""


@dataclass(frozen=True)
class NodeFaithfulness(Faithfulness):
    """Curves over the number of nodes kept."""

    completeness: list[float]
    """The same share for everything but these nodes."""
    errors: str = "nodes"
    """Treatment of error nodes."""
    intervals: Intervals | None = None
    """How far the curves depend on the prompts; None where not computed, or where prompts are too few."""
    drawn: str = ""
    """The units that intervals draw anew, `100 prompts drawn by their 17 templates`."""
    gain: Gain | None = None
    """Gain of optimal constants over means on these prompts; None for other ablations."""

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
        return {**super().to_dict(), "cpr": self.cpr, "cmd": self.cmd}

    def to_frame(self) -> pd.DataFrame:
        """One row a size: nodes, faithfulness, completeness, with their intervals where there are any, and the smallest
        and largest faithfulness of random circuits.
        """
        curves = pd.DataFrame({"nodes": self.sizes})
        for name in ("faithfulness", "completeness"):
            curves[name] = getattr(self, name)
            if self.intervals:
                curves[[f"{name}_low", f"{name}_high"]] = getattr(self.intervals, name)
        return _with_random(curves, self.random)

    def table(self) -> str:
        """One row a size."""
        bounds = self.intervals.faithfulness if self.intervals else []
        table = _curve_table("nodes", self.sizes, self.faithfulness, bounds, self.random)
        table["completeness"] = [f"{value:.3f}" for value in self.completeness]
        if self.intervals:
            texts = [format_interval(bounds) for bounds in self.intervals.completeness]
            table.insert(len(table.columns), "95 %", texts, allow_duplicates=True)
        return format_table(table)

    def setting(self) -> str:
        """Words for which nodes are ablated, and how."""
        return f"nodes from {self.start_site} on, others ablated by {self.ablation}{ERRORS_TEXT[self.errors]}"

    def text(self) -> str:
        """The setting in words, the table, the areas, and how the intervals are made."""
        return "\n".join(
            [
                f"{self.n_prompts} prompts{self.left_out}; {self.setting()}",
                f"m: {self.m_model:+.3f} whole model, {self.m_empty:+.3f} with every node ablated",
                self.table(),
                self.areas(),
                self.evidence(),
                *([f"optimal constants: {self.gain}"] if self.gain else []),
            ]
        )

    def areas(self) -> str:
        """CPR and CMD in a line."""
        bounds = (self.intervals.cpr, self.intervals.cmd) if self.intervals else ()
        of_cpr, of_cmd = (f" {format_interval(pair)}" for pair in bounds) if bounds else ("", "")
        return (
            f"area under faithfulness (CPR) {self.cpr:.3f}{of_cpr}, "
            f"under its distance from 1 (CMD) {self.cmd:.3f}{of_cmd}"
        )

    def evidence(self) -> str:
        """A line on how the intervals are made, or why there are none."""
        if self.intervals is None:
            return f"no intervals over {self.drawn}: none were asked for, or there are too few to tell"
        return f"95 % bootstrap intervals over {self.drawn}; {COVERAGE}"

    def plot(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Faithfulness, completeness and random circuits over size, as .svg, .png or .pdf; `overwrite` as in `save`."""
        bounds = self.intervals
        return plot_curves(
            path,
            self.sizes,
            [
                Curve("circuit (faithfulness)", self.faithfulness, bounds.faithfulness if bounds else ()),
                Curve("all but the circuit (completeness)", self.completeness, bounds.completeness if bounds else ()),
            ],
            xlabel=f"nodes kept, from {self.start_site} on",
            levels=(0, 1),
            random=self.random,
            random_label="random circuits",
            overwrite=overwrite,
        )


@dataclass(frozen=True)
class EdgeFaithfulness(Faithfulness):
    """A curve over the number of edges kept."""

    all_joined: float
    """Faithfulness with every node joined to every earlier one, weight or not: that of the nodes."""
    n_edges: int
    """Edges with a weight, from the start site on."""
    intervals: list[list[float]]
    """95 % bootstrap interval over the prompts of each size's faithfulness; empty where not computed."""

    def to_frame(self) -> pd.DataFrame:
        """One row a size: edges, faithfulness with its interval, and the smallest and largest of random edges."""
        curve = pd.DataFrame({"edges": self.sizes, "faithfulness": self.faithfulness})
        if self.intervals:
            curve[["faithfulness_low", "faithfulness_high"]] = self.intervals
        return _with_random(curve, self.random)

    def table(self) -> str:
        """One row a size, and the ends of the curve in a line."""
        table = _curve_table("edges", self.sizes, self.faithfulness, self.intervals, self.random)
        end = f"{self.n_edges} edges have a weight; with all {self.n_nodes} nodes joined {self.all_joined:.3f}"
        return f"{format_table(table)}\n{end}"

    def text(self) -> str:
        """The setting in words, and the table."""
        prompts = f"{self.n_prompts} prompts{self.left_out}"
        return f"{prompts}; edges among the {self.n_nodes} strongest nodes, all other inputs ablated\n{self.table()}"

    def plot(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Faithfulness of the strongest and of random edges over their number, as .svg, .png or .pdf; `overwrite` as in
        `save`.
        """
        return plot_curves(
            path,
            self.sizes,
            [Curve("strongest edges", self.faithfulness, self.intervals)],
            xlabel=f"edges kept, from {self.start_site} on",
            levels=(0,),
            random=self.random,
            random_label="random edges",
            dashed=("all nodes joined", self.all_joined),
            overwrite=overwrite,
        )


def area(heights: Sequence[float], sizes: Sequence[int], n_nodes: int) -> float:
    """Trapezoid area under heights over size / n_nodes, from the first size to the last, which must be all nodes: what
    was not measured has no height.
    """
    if sizes[-1] != n_nodes:
        raise ValueError(f"the largest size is {sizes[-1]}: the area needs the value measured with all {n_nodes} nodes")
    return float(trapezoid(heights, np.asarray(sizes) / n_nodes))


def cpr(faithfulness: Sequence[float], sizes: Sequence[int], n_nodes: int) -> float:
    """Area under faithfulness over the share of nodes kept, from no node (0) to all (1)."""
    return area([0.0, *faithfulness], [0, *sizes], n_nodes)


def cmd(faithfulness: Sequence[float], sizes: Sequence[int], n_nodes: int) -> float:
    """Area under |1 - faithfulness| over the share of nodes kept."""
    return area([1.0, *(abs(1 - f) for f in faithfulness)], [0, *sizes], n_nodes)


def _curve_table(
    unit: str,
    sizes: Sequence[int],
    faithfulness: Sequence[float],
    intervals: Sequence[list[float]],
    random: Sequence[Sequence[float]],
) -> pd.DataFrame:
    """Texts, one row a size: faithfulness, its interval, and what random sets had, as `-0.02 to +0.11`."""
    table = pd.DataFrame({unit: sizes}).astype(str)
    table["faithfulness"] = [f"{value:.3f}" for value in faithfulness]
    if intervals:
        table["95 %"] = [format_interval(bounds) for bounds in intervals]
    if random:
        ranges = [(min(values), max(values)) for values in zip(*random, strict=True)]
        table["random"] = [f"{signed(low)} to {signed(high)}" for low, high in ranges]
    return table


def _with_random(curves: pd.DataFrame, random: Sequence[Sequence[float]]) -> pd.DataFrame:
    return curves.assign(random_min=np.min(random, 0), random_max=np.max(random, 0)) if random else curves


def signed(value: float) -> str:
    """Two digits with a sign; what rounds to zero has none."""
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"
