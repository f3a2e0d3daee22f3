"""SHIFT as a picture: every probe's accuracy on the intended label, over groups and in each."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from circuits.debiasing.results import ShiftReport
from sae._plotting import COLOURS, PALE, RULE, quiet, save_figure


def plot_shift(report: ShiftReport, path: str | Path, *, overwrite: bool = False) -> Path:
    """One row a probe: mean over groups with its interval, the worst group, and the others pale. .svg, .png or .pdf."""
    scores = list(reversed(report.scores))
    figure = Figure(figsize=(7, 0.9 + 0.34 * len(scores)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0.5, color=RULE, lw=1)
    for row, score in enumerate(scores):
        axes.plot(list(score.by_group.values()), [row] * len(score.by_group), "|", color=PALE, ms=9)
        axes.plot(score.intended_interval, [row, row], color=COLOURS[0], lw=2, alpha=0.4, solid_capstyle="round")
        axes.plot(
            score.worst_group, row, "o", mfc="white", mec=COLOURS[1], ms=7, label="worst group" if not row else None
        )
        axes.plot(score.intended, row, "o", color=COLOURS[0], ms=6, label="mean of the groups" if not row else None)
    labels = [f"{score.name} ({score.n_features})" if score.n_features else score.name for score in scores]
    axes.set_yticks(range(len(scores)), labels)
    axes.set(xlim=(-0.03, 1.03), xlabel="accuracy on the intended label")
    quiet(axes, size=9)
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, fontsize=9)
    return save_figure(figure, path, overwrite=overwrite)
