"""The comparison of node methods as tables for the terminal and as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from circuits.comparison.compare import LEVELS, Comparison, MethodScore
from circuits.comparison.study import MEAN, NOISING
from sae._plotting import COLOURS, PALE, RULE, quiet, save_figure
from sae._tables import aligned
from sae.neurons import NEURONS

BASELINES = ("random", "activation-difference")


def name_of(row: MethodScore) -> str:
    """`ig`, `ig (neurons)`"""
    return f"{row.method} ({row.dictionary})" if row.dictionary == NEURONS else row.method


def tables(comparison: Comparison) -> str:
    """Two tables: the circuits, then the estimates and what they cost."""
    rows, sizes = comparison.rows, comparison.options.circuit_sizes
    circuits = [
        ["", *map(str, sizes), "CPR", "95 %", "CMD", "95 %", *(f"n({level})" for level in LEVELS), "of"],
        *([name_of(row), *_circuit(row, sizes)] for row in rows),
    ]
    without = [
        ["", *map(str, sizes)],
        *([name_of(row), *(_number(_at(row, row.curve.completeness, size)) for size in sizes)] for row in rows),
    ]
    estimates = [
        ["", "estimates", "r noising", "rank", "r mean", "rank", "errors", "residual", "nodes", "seconds", "MB"],
        *([name_of(row), *_estimate(row)] for row in rows),
    ]
    drawn = ", ".join(f"{n} features of the {name}" for name, n in comparison.sampled.items() if n)
    sample = f" ({drawn})" if drawn else ""
    first = rows[0].curve
    return "\n".join(
        [
            f"faithfulness of the strongest nodes on {comparison.n_test} held-out prompts, found on "
            f"{comparison.n_train}; nodes from {first.start_site} on, others ablated by {first.ablation}; "
            "n(x): nodes needed for faithfulness x",
            aligned(circuits),
            "",
            "what is left without them (completeness)",
            aligned(without),
            "",
            f"correlation with exact patching{sample}: noising, and the mean of noising and denoising; * what the "
            "method estimates; errors: the same for the error nodes",
            aligned(estimates),
        ]
    )


def _circuit(row: MethodScore, sizes: Sequence[int]) -> list[str]:
    known = row.curve.intervals
    spans = ["", ""] if known is None else [f"[{low:.2f}, {high:.2f}]" for low, high in (known.cpr, known.cmd)]
    needed = (row.nodes_for[str(level)] for level in LEVELS)
    return [
        *(_number(_at(row, row.curve.faithfulness, size)) for size in sizes),
        f"{row.curve.cpr:.3f}",
        spans[0],
        f"{row.curve.cmd:.3f}",
        spans[1],
        *("-" if n is None else f"{n:.0f}" for n in needed),
        str(row.curve.n_nodes),
    ]


def _estimate(row: MethodScore) -> list[str]:
    cells = [row.estimates or "-"]
    for quantity in (NOISING, MEAN):
        found = row.agreement.get(quantity)
        mark = "*" if row.estimates == quantity else " "
        cells += ["-", "-"] if found is None else [f"{found.pearson:.3f}{mark}", f"{found.spearman:.3f}{mark}"]
    own = row.agreement.get(row.estimates or NOISING)
    cells += [_number(own.errors if own else None), "-" if row.residual is None else f"{row.residual:.4f}"]
    cells.append("-" if row.path_nodes is None else f"{row.path_nodes:.1f}")
    return [*cells, f"{row.seconds:.1f}", f"{row.peak_bytes / 1e6:.1f}"]


def _at(row: MethodScore, values: Sequence[float], size: int) -> float | None:
    """The value at a size; None where the dictionary has fewer nodes."""
    return values[row.curve.sizes.index(size)] if size in row.curve.sizes else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def plot(comparison: Comparison, path: str | Path) -> Path:
    """Faithfulness and completeness over circuit size, one line a method, as .svg, .png or .pdf."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = iter(COLOURS * len(comparison.rows))
    known: dict[str, str] = {}
    for row in comparison.rows:
        if row.method not in known:
            known[row.method] = PALE if row.method in BASELINES else next(colours)
        style = {
            "color": known[row.method],
            "ls": ":" if row.method == "random" else "--" if row.dictionary == NEURONS else "-",
            "lw": 1.2 if row.method in BASELINES else 1.8,
        }
        left.plot(row.curve.sizes, row.curve.faithfulness, label=name_of(row), **style)
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
    return save_figure(figure, path)
