"""Results of SHIFT, as a record: for JSON, for the terminal, for a notebook and for a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from circuits._results import format_interval
from sae._files import check_type, read_json, without_nan
from sae._frames import Result, frame_text
from sae.errors import UserError

SCHEMA_VERSION = 1
ORIGINAL, SHIFT, CENTRED, RETRAINED = "original probe", "SHIFT", "SHIFT, threshold centred", "SHIFT, retrained"
RANDOM, EMBEDDINGS, EMBEDDINGS_RETRAINED = "random features", "embedding features", "embedding features, retrained"
FEATURE_SKYLINE, NEURON_SKYLINE = "feature skyline", "neuron skyline"
BOTTLENECK, ORACLE = "concept bottleneck", "oracle"
EXPLAINED = {
    ORIGINAL: "trained on the ambiguous texts",
    SHIFT: "the same probe, judged features ablated",
    CENTRED: "its threshold moved so that its mean output on the ambiguous texts is what it was; no label is read",
    RETRAINED: "trained again on the ambiguous texts of the edited model",
    RANDOM: "as many random active features ablated, mean over draws",
    EMBEDDINGS: "judged features of the embedding alone, ablated at every token",
    EMBEDDINGS_RETRAINED: "the same, probe trained again",
    FEATURE_SKYLINE: "as many features, those with the largest effect towards the spurious label on balanced texts",
    NEURON_SKYLINE: "as many neurons, chosen likewise",
    BOTTLENECK: "a probe of the activations of the features that were kept, trained on the ambiguous texts",
    ORACLE: "trained on balanced texts",
}
"""What each row of the table is, in words."""


@dataclass(frozen=True)
class ProbeScore:
    """How often one probe is right on the test texts."""

    name: str
    """Name of the probe or edit: see `EXPLAINED`."""
    intended: float
    """Accuracy on the intended label, mean over groups."""
    spurious: float
    """Share of texts in which it gives the class that goes with the spurious label, mean over groups."""
    worst_group: float
    """Accuracy on the intended label in the group where that is smallest."""
    by_group: dict[str, float]
    """Accuracy on the intended label in every group."""
    intended_interval: tuple[float, float]
    """95 % interval over test texts."""
    worst_group_interval: tuple[float, float]
    """95 % interval over the test texts of the group."""
    n_features: int | None = None
    """Features, or neurons, that were ablated, or read; None where the model is as it was."""


@dataclass(frozen=True)
class JudgedFeature:
    """A feature of the probe's circuit, what a judge is shown of it, and what it said."""

    feature: str
    """Its name, `resid_3/120` or `resid_3/120@subject`."""
    effect: float
    """Indirect effect on the probe's margin: positive where the probe leans on it."""
    label: str
    """Label by people or programs; empty where there is none."""
    tokens: list[str]
    """Tokens of the ambiguous texts at which it is strongest, each once."""
    contexts: list[str]
    """Texts in which it is strongest, the token in «»."""
    by_class: dict[str, float]
    """Mean activation on the ambiguous texts of each class."""
    dropped: bool | None = None
    """Whether it was ablated; None where there was no judge."""
    reason: str = ""
    """The judge's reason."""


@dataclass(frozen=True)
class ShiftReport(Result):
    """A probe before and after the features that it should not use were ablated, beside what else one could do."""

    site: str
    """Where the probe reads."""
    position: str
    """Which token: `last`, `mean`, or a span."""
    classes: tuple[str, str]
    """Intended labels."""
    pairs: tuple[str, str]
    """The spurious label that goes with each of them in the ambiguous texts."""
    judge: str
    """Who judged: `list`, `keywords`, `concept`, `program`, `function`, or `none`."""
    operation: str
    """What ablated features became."""
    features: list[JudgedFeature]
    """The features that were judged, strongest first."""
    scores: list[ProbeScore]
    """One entry a probe."""
    n_ambiguous: int
    """Texts the probe was trained on."""
    n_balanced: int
    """Texts that skylines and oracle learned from."""
    n_test: int
    """Texts that all are tested on."""
    ambiguous_accuracy: float
    """Accuracy of the original probe on ambiguous texts it was not trained on."""
    edits: list[dict[str, Any]] = field(default_factory=list)
    """The ablation as `load_edits` reads it."""

    def score(self, name: str) -> ProbeScore | None:
        """The row of that name."""
        return next((score for score in self.scores if score.name == name), None)

    @property
    def dropped(self) -> list[str]:
        """The features that were ablated."""
        return [feature.feature for feature in self.features if feature.dropped]

    def share_closed(self, name: str) -> float | None:
        """The share of the way from the original probe's accuracy to the oracle's that a row goes (SCR in SAEBench)."""
        original, oracle, row = self.score(ORIGINAL), self.score(ORACLE), self.score(name)
        if original is None or oracle is None or row is None or oracle.intended <= original.intended:
            return None
        return (row.intended - original.intended) / (oracle.intended - original.intended)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        derived = {
            "dropped": self.dropped,
            "share_closed": {row.name: self.share_closed(row.name) for row in self.scores},
        }
        return without_nan({"schema_version": SCHEMA_VERSION, "kind": "shift", **asdict(self), **derived})

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str | Path = "shift") -> ShiftReport:
        """The report that `to_dict` wrote; `UserError`, naming `where`, for anything else."""
        if data.get("kind") != "shift" or data.get("schema_version") != SCHEMA_VERSION:
            given = f"{data.get('kind')!r}, version {data.get('schema_version')!r}"
            raise UserError(f"{where}: not a SHIFT of schema_version {SCHEMA_VERSION}: found {given}")
        report: ShiftReport = check_type(dict(data), ShiftReport, where)
        if len({tuple(score.by_group) for score in report.scores}) != 1:
            raise UserError(f"{where}: scores must be some, and of the same groups")
        return report

    @staticmethod
    def load(path: str | Path) -> ShiftReport:
        """The report that `save` wrote."""
        return ShiftReport.from_dict(read_json(path), path)

    def to_frame(self) -> pd.DataFrame:
        """One row a probe: features ablated, accuracy on the intended label with its interval, on the spurious one, of
        the worst group, and of every group.
        """
        rows = []
        for score in self.scores:
            low, high = score.intended_interval
            row = {
                "probe": score.name,
                "features": score.n_features,
                "intended": score.intended,
                "low": low,
                "high": high,
            }
            row |= {"spurious": score.spurious, "worst_group": score.worst_group, **score.by_group}
            rows.append(row)
        return pd.DataFrame(rows).astype({"features": "Int64"})

    def features_frame(self) -> pd.DataFrame:
        """One row a judged feature."""
        rows = [{**asdict(feature), "tokens": " ".join(feature.tokens)} for feature in self.features]
        return pd.DataFrame(rows).drop(columns=["contexts", "by_class"], errors="ignore")

    def title(self) -> str:
        """One line: which probe, and what was done."""
        pairs = ", ".join(f"{one} with {other}" for one, other in zip(self.classes, self.pairs, strict=True))
        what = f"{len(self.dropped)} of {len(self.features)} features ablated ({self.operation})"
        what = what if self.judge != "none" else "no judge, nothing ablated"
        return f"probe at {self.site}, {self.position}; ambiguous texts: {pairs}; {what}"

    def remarks(self) -> list[str]:
        """Sentences that a reader of the numbers has to know."""
        texts = f"trained on {self.n_ambiguous} ambiguous texts, tested on {self.n_test} others"
        lines = [f"{texts}; on ambiguous texts the original probe is right in {self.ambiguous_accuracy:.1%}"]
        if not self.n_balanced:
            lines.append("no balanced texts to learn from: neither skylines nor oracle")
        for name in (SHIFT, RETRAINED):
            share, row = self.share_closed(name), self.score(name)
            if share is not None and row is not None:
                interval = format_interval(row.intended_interval)
                lines.append(f"{name}: {row.intended:.3f} {interval} right, {share:.0%} of the way to the oracle")
        return lines

    def text(self) -> str:
        """The table, with what it means, for the terminal."""
        frame = self.to_frame().drop(columns=["low", "high"])
        frame["features"] = frame["features"].map(lambda n: "" if pd.isna(n) else str(n))
        lines = [self.title(), frame_text(frame), *self.remarks()]
        if self.judge == "none":
            lines += ["", "features to judge, strongest first; write those to ablate into a file for --drop:"]
            lines += [
                f"{one.feature}  # {one.effect:+.3f} {one.label or ' '.join(one.tokens[:6])}" for one in self.features
            ]
        return "\n".join(lines)


@dataclass(frozen=True)
class PerturbationReport(Result):
    """Targeted probe perturbation: does ablating one class's features hurt its probe alone?"""

    site: str
    """Where the probes read, and the autoencoder stands."""
    position: str
    """Which token."""
    classes: list[str]
    """The classes."""
    sizes: list[int]
    """Numbers of features ablated."""
    accuracy: list[float]
    """Accuracy of each class's probe on balanced test texts, nothing ablated."""
    drops: list[list[list[float]]]
    """[size][class whose features are ablated][class of the probe] loss of accuracy."""
    features: list[list[str]]
    """The features of each class, strongest first."""
    n_train: int
    """Texts learned from."""
    n_test: int
    """Texts tested on."""
    intervals: list[tuple[float, float]] = field(default_factory=list)
    """[size] 95 % interval of TPP over test texts."""

    def on_target(self, size: int) -> float:
        """Mean loss of the probe whose features are ablated."""
        table = self.drops[self.sizes.index(size)]
        return sum(table[one][one] for one in range(len(table))) / len(table)

    def off_target(self, size: int) -> float:
        """Mean loss of all other probes."""
        table = self.drops[self.sizes.index(size)]
        others = [table[one][other] for one in range(len(table)) for other in range(len(table)) if one != other]
        return sum(others) / len(others)

    def score(self, size: int) -> float:
        """TPP: loss on target minus loss off target (SAEBench, Karvonen et al. 2025)."""
        return self.on_target(size) - self.off_target(size)

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        derived = {"tpp": {str(size): self.score(size) for size in self.sizes}}
        return {"schema_version": SCHEMA_VERSION, "kind": "targeted probe perturbation", **asdict(self), **derived}

    def to_frame(self) -> pd.DataFrame:
        """One row a number of features: loss of accuracy on target, off target, their difference, and its interval."""
        rows = [
            (size, self.on_target(size), self.off_target(size), self.score(size), *bounds)
            for size, bounds in zip(self.sizes, self.intervals or [(math.nan, math.nan)] * len(self.sizes), strict=True)
        ]
        return pd.DataFrame(rows, columns=["features", "on_target", "off_target", "tpp", "low", "high"])

    def text(self) -> str:
        """The table, with the accuracy that the probes begin at."""
        mean = sum(self.accuracy) / len(self.accuracy)
        head = (
            f"{len(self.classes)} probes at {self.site}, {self.position}: {mean:.3f} right on {self.n_test} test texts"
        )
        return f"{head}\n{frame_text(self.to_frame())}"
