"""What an edit did, as a record: for JSON, for the terminal and for the report.

What is *left* of a behaviour is told case by case, metric after over metric before, and is negative where the behaviour
is reversed. Over several cases it is the mean size, mean |m after| over mean |m before| with cases weighing alike, so
that a case that is reversed never makes up for one that is untouched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from circuits._results import format_interval, format_table
from sae._files import check_type, read_json, without_nan
from sae._frames import Result
from sae.errors import UserError, unknown

SCHEMA_VERSION = 1
CE = "cross-entropy"
"""On other text, in nats a token."""
ACTIONS = {
    "zero": "set to zero", "mean": "set to their mean", "resample": "set to values at other tokens", "set": "set to {}",
    "clamp": "held to at most {}", "scale": "multiplied by {}", "steer": "steered by {}", "several": "edited",
}  # fmt: skip
"""Operation -> what was done to the features, in words."""
SEVERAL = "several"
"""The operation of a report on several edits."""
TINY = 0.01
"""Share of the mean size below which a case shows nothing of the behaviour before the edit, so that nothing is left."""
REVERSED = -0.05
"""A case is called reversed where less than this is left of it."""


@dataclass(frozen=True)
class Score:
    """The behaviour on one group of prompts."""

    n: int
    """Number of prompts."""
    metric: float
    """Mean of `EditReport.metric`."""
    accuracy: float | None
    """Share of prompts with the right answer ahead of the wrong one; without pairs, ahead of all tokens. None where
    prompts have no answers, for probes.
    """


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of the model, edited or not."""

    overall: Score
    """On all prompts."""
    by_case: dict[str, Score] = field(default_factory=dict)
    """On the prompts of each case, where there are several."""
    ce: float | None = None
    """Cross-entropy on other text, nats a token; None where no text was given."""

    @property
    def size(self) -> float:
        """Mean over cases of |metric|, each case weighing alike; the metric itself where there are no cases."""
        scores = self.by_case.values()
        return sum(abs(score.metric) for score in scores) / len(scores) if scores else self.overall.metric


@dataclass(frozen=True)
class Continuation:
    """What the model says after a prompt."""

    prompt: str
    """The prompt."""
    before: str
    """Greedy continuation of the model as it is."""
    after: str
    """Greedy continuation of the edited model."""


@dataclass(frozen=True)
class EditReport(Result):
    """An edit, what it did, and what the same edit of random features did."""

    features: list[str]
    """The edited features."""
    operation: str
    """What was done: see `circuits.editing.edit`; `several` for several edits at once."""
    value: float | None
    """The value of `set`, `clamp`, `scale` and `steer`."""
    metric: str
    """What `Score.metric` is: `logit difference` of clean minus patch answer, `answer logit` without pairs, or the name
    of another metric.
    """
    n_prompts: int
    """Number of prompts measured."""
    n_texts: int
    """Number of other texts measured."""
    before: Behaviour
    """The model as it is."""
    after: Behaviour
    """The edited model."""
    random: list[Behaviour]
    """One entry a draw: as many random features, active on the prompts, given the same edit; fewer where `random_left`
    says so, and no entry where there are none to draw.
    """
    random_features: list[list[str]]
    """The features of each draw."""
    continuations: list[Continuation] = field(default_factory=list)
    """Sample continuations before and after."""
    seed: int = 0
    """Seed of the draws."""
    random_left: int | None = None
    """Random features there were to draw, where these are fewer than the edited ones."""
    shares: bool = True
    """Whether the metric after the edit over that before is the share of the behaviour that is left."""
    edits: list[dict[str, Any]] = field(default_factory=list)
    """The edits as objects, with what they refer to; `load_edits` reads them from the report's file."""

    @property
    def remaining(self) -> float | None:
        """Share of the behaviour that the edit leaves, by its mean size over cases; None where there was none."""
        return self.left(self.after)

    @property
    def random_remaining(self) -> list[float | None]:
        """The same for each draw of random features."""
        return [self.left(draw) for draw in self.random]

    @property
    def remaining_by_case(self) -> dict[str, float | None]:
        """What is left of each case, negative where it is reversed; None where it showed nothing before."""
        return {case: self.left(self.after, case) for case in self.before.by_case}

    @property
    def reversed_cases(self) -> list[str]:
        """The cases in which the behaviour has the other sign after the edit."""
        return [case for case, left in self.remaining_by_case.items() if left is not None and left < REVERSED]

    def left(self, run: Behaviour, case: str | None = None) -> float | None:
        """Metric of a run over that before, of one case or by the mean size; None where that says nothing."""
        before = self.before.size if case is None else self.before.by_case[case].metric
        after = run.size if case is None else run.by_case[case].metric
        tiny = max(1e-9, TINY * abs(self.before.size) if case else 0.0)
        return after / before if self.shares and abs(before) > tiny else None

    @property
    def ce_increase(self) -> float | None:
        """Cost of the edit on other text, nats a token."""
        if self.after.ce is None or self.before.ce is None:
            return None
        return self.after.ce - self.before.ce

    def to_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        derived = {
            "remaining": self.remaining,
            "random_remaining": self.random_remaining,
            "remaining_by_case": self.remaining_by_case,
            "reversed_cases": self.reversed_cases,
            "ce_increase": self.ce_increase,
        }
        return without_nan({"schema_version": SCHEMA_VERSION, "kind": "edit", **asdict(self), **derived})

    @staticmethod
    def from_dict(data: Mapping[str, Any], where: str | Path = "edit") -> EditReport:
        """The report that `to_dict` wrote; `UserError`, naming `where`, for anything else."""
        if data.get("kind") != "edit" or data.get("schema_version") != SCHEMA_VERSION:
            given = f"{data.get('kind')!r}, version {data.get('schema_version')!r}"
            raise UserError(f"{where}: not an edit of schema_version {SCHEMA_VERSION}: found {given}")
        report = check_type(dict(data), EditReport, where)
        if report.operation not in ACTIONS:
            raise UserError(f"{where}: {unknown('operation', report.operation, ACTIONS)}")
        first = report.before
        for run in report.runs:
            if list(run.by_case) != list(first.by_case) or (run.ce is None) != (first.ce is None):
                raise UserError(f"{where}: the edit was not measured on the same cases and texts as the model before")
        return report

    @staticmethod
    def load(path: str | Path) -> EditReport:
        """The report that `save` wrote."""
        return EditReport.from_dict(read_json(path), path)

    @property
    def runs(self) -> list[Behaviour]:
        """Before, after, and every random draw."""
        return [self.before, self.after, *self.random]

    @property
    def action(self) -> str:
        """What was done to the features, in words: `set to zero`."""
        return ACTIONS[self.operation].format(self.value)

    def title(self) -> str:
        """`10 features set to zero on 192 prompts`."""
        n = len(self.features)
        return f"{n} {'feature' if n == 1 else 'features'} {self.action} on {self.n_prompts} prompts"

    def to_frame(self) -> pd.DataFrame:
        """One row a quantity, of all prompts and by case: quantity, case, before, after, the share left, and of random
        features mean, smallest, largest and the share left.
        """
        rows = []
        for quantity, case, values in self._quantities():
            before, after, *drawn = values
            row = {"quantity": quantity, "case": case, "before": before, "after": after}
            left = [self.left(run, case) for run in self.runs[1:]] if quantity == self.metric else [None] * len(values)
            row["left"], *of_random = left
            if drawn:
                shares = [share for share in of_random if share is not None]
                row |= {"random_mean": sum(drawn) / len(drawn), "random_min": min(drawn), "random_max": max(drawn)}
                row["random_left"] = sum(shares) / len(shares) if shares else None
            rows.append(row)
        return pd.DataFrame(rows).astype({"left": float} | ({"random_left": float} if self.random else {}))

    def _quantities(self) -> Iterator[tuple[str, str | None, list[float]]]:
        """(quantity, case or None for all prompts, its values before, after, and of every random draw)."""
        cases = list(self.before.by_case)
        yield self.metric, None, [run.size for run in self.runs]
        for case in cases:
            yield self.metric, case, [run.by_case[case].metric for run in self.runs]
        if self.before.overall.accuracy is not None:
            yield "accuracy", None, [run.overall.accuracy or 0.0 for run in self.runs]
            for case in cases:
                yield "accuracy", case, [run.by_case[case].accuracy or 0.0 for run in self.runs]
        if self.before.ce is not None:
            yield CE, None, [run.ce or 0.0 for run in self.runs]

    def table(self) -> str:
        """Before, after and the random control, one row a quantity."""
        values = self.to_frame()
        digits = [3 if quantity == CE else 2 for quantity in values["quantity"]]
        is_metric = values["quantity"] == self.metric
        table = pd.DataFrame(index=[self._row_name(row.quantity, row.case) for row in values.itertuples()])
        for name in ("before", "after"):
            table[name] = [f"{value:.{n}f}" for value, n in zip(values[name], digits, strict=True)]
        table["left"] = [_percent(left) if shown else "" for left, shown in zip(values["left"], is_metric, strict=True)]
        if self.random:
            bounds = zip(values["random_mean"], values["random_min"], values["random_max"], digits, strict=True)
            table[self.random_title()] = [
                f"{mean:.{n}f} {format_interval((low, high), n)}" for mean, low, high, n in bounds
            ]
            left = zip(values["random_left"], is_metric, strict=True)
            table.insert(4, "left", [_percent(share) if shown else "" for share, shown in left], allow_duplicates=True)
        return format_table(table)

    def _row_name(self, quantity: str, case: str | None) -> str:
        if isinstance(case, str):
            return f"  {case}"
        if quantity == CE:
            return f"CE on {self.n_texts} texts"
        return f"{quantity}, mean size" if quantity == self.metric and self.before.by_case else quantity

    def text(self) -> str:
        """What was edited, the table, what it needs to be read rightly, and the continuations."""
        lines = [self.title(), self.table(), *self.remarks()]
        for sample in self.continuations:
            lines += ["", sample.prompt, f"  before:{_space(sample.before)}", f"  after: {_space(sample.after)}"]
        return "\n".join(lines)

    def random_title(self) -> str:
        """`random features (5 draws)`, and how many they are where there were fewer to draw than are edited."""
        few = "" if self.random_left is None else f" of {self.random_left}, not {len(self.features)}"
        return f"random features ({len(self.random)} {'draw' if len(self.random) == 1 else 'draws'}{few})"

    def remarks(self) -> list[str]:
        """What the table needs to be read rightly."""
        remarks = []
        if self.reversed_cases:
            remarks.append(f"reversed: {', '.join(self.reversed_cases)} (the metric has the other sign after the edit)")
        if self.random_left == 0:
            remarks.append("no random features to compare with: all that are active there are edited")
        return remarks


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.0f} %"


def _space(text: str) -> str:
    return " " + " ".join(text.split())
