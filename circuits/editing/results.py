"""Report of an edit, as a record: for JSON, for the terminal and for the report.

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
from circuits.editing.choice_text import NO_COST, SURGICAL_COST, SURGICAL_LEFT, about_choice
from circuits.editing.records import COMMON, Behaviour, Bias, Choice, Continuation, Dose, Fluency, Intervals
from sae._files import check_type, read_json, without_nan
from sae._frames import Result, frame_text
from sae.errors import UserError, unknown

SCHEMA_VERSION = 1
CE = "cross-entropy"
"""On other text, in nats a token."""
COSTS = {CE: "ce", "CE at the behaviour's tokens": "ce_behaviour", "CE elsewhere": "ce_elsewhere", "KL": "kl"}
"""Quantities measured on other text -> their field of `Behaviour`."""
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
    random_equal_norm: list[Behaviour] = field(default_factory=list)
    """The same draws, their changes scaled to the edit's own norm on the prompts."""
    random_directions: list[Behaviour] = field(default_factory=list)
    """Random directions, at each token and site as long as the edit's change there."""
    random_equal_effect: list[Behaviour] = field(default_factory=list)
    """Of an edited supernode: a draw each of other features of the circuit, as many and of nearly the same summed
    |effect|.
    """
    equal_effect_shares: list[float] = field(default_factory=list)
    """Summed |effect| of each of these draws over that of the edited features."""
    strongest: Behaviour | None = None
    """Where features were chosen: the circuit's ten strongest set to zero, to compare with."""
    intervals: Intervals | None = None
    """Intervals of what is left; None where there are none."""
    bias: Bias | None = None
    """To which answers the edited model leans; None where cases have no two sides."""
    doses: list[Dose] = field(default_factory=list)
    """The edit at other strengths."""
    fluency: list[Fluency] = field(default_factory=list)
    """Fluency of the continuations before and after."""
    choice: Choice | None = None
    """How the features were chosen, where the program chose them."""
    spread_on_text: bool = False
    """Whether the edit is of spans, or of some tokens alone, and was made at all tokens of the other text."""
    answer_share: float | None = None
    """Share of the other text's predictions that are of the behaviour's answers; above a quarter they count like all
    others, as cost elsewhere.
    """

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
        """The share left of each case, negative where it is reversed; None where it showed nothing before."""
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
            "ce_elsewhere_increase": self.cost_elsewhere,
            "is_surgical": self.is_surgical,
            "flipped": self.flipped,
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
        """The operation in words: `set to zero`."""
        strength = self.edits[0].get("strength", 1.0) if len(self.edits) == 1 else 1.0
        times = "" if strength == 1 else f", change times {strength:g},"
        held = " with attention frozen" if any(edit.get("freeze") == "attention" for edit in self.edits) else ""
        return ACTIONS[self.operation].format(self.value) + times + held

    @property
    def flipped(self) -> float | None:
        """Share of the prompts in which the other answer is ahead after the edit; None where there are not two."""
        accuracy = self.after.overall.accuracy
        return None if accuracy is None or self.metric != "logit difference" else 1 - accuracy

    def title(self) -> str:
        """`10 features set to zero on 192 prompts`."""
        n, prompts = len(self.features), "prompt" if self.n_prompts == 1 else "prompts"
        return f"{n} {'feature' if n == 1 else 'features'} {self.action} on {self.n_prompts} {prompts}"

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
        for quantity, name in COSTS.items():
            if getattr(self.before, name) is not None:
                yield quantity, None, [getattr(run, name) or 0.0 for run in self.runs]

    def table(self) -> str:
        """Before, after and the random control, one row a quantity."""
        values = self.to_frame()
        digits = [3 if quantity in COSTS else 2 for quantity in values["quantity"]]
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
        if quantity in COSTS:
            return f"CE on {self.n_texts} texts" if quantity == CE else f"  {quantity.removeprefix('CE ')}"
        return f"{quantity}, mean size" if quantity == self.metric and self.before.by_case else quantity

    def text(self) -> str:
        """The edit in words, the table, remarks on how to read it, and the continuations."""
        lines = [self.title(), self.table(), *self.remarks()]
        if self.doses:
            lines += ["", frame_text(self.dose_table(), {"left": 2, "scale": 2})]
        for sample in self.continuations:
            lines += ["", sample.prompt, f"  before:{_space(sample.before)}", f"  after: {_space(sample.after)}"]
        return "\n".join(lines)

    def random_title(self) -> str:
        """`random features (5 draws)`, and how many they are where there were fewer to draw than are edited."""
        few = "" if self.random_left is None else f" of {self.random_left}, not {len(self.features)}"
        return f"random features ({len(self.random)} {'draw' if len(self.random) == 1 else 'draws'}{few})"

    def remarks(self) -> list[str]:
        """Sentences on how to read the table, and what does not fit into it."""
        remarks = [*self._about_choice()]
        if self.intervals is not None and self.intervals.remaining is not None:
            low, high = self.intervals.remaining
            remarks.append(f"left: 95 % interval {_percent(low)} to {_percent(high)} over {self.intervals.drawn}")
        if self.bias is not None and self.before.size > 0:
            size = self.before.size
            remarks.append(
                f"bias: the answers lean to those of {', '.join(self.bias.towards)} by {self.bias.after:.2f} "
                f"({_percent(self.bias.after / size)} of the behaviour's size; {self.bias.before:+.2f} before)"
            )
        if self.flipped is not None and self.flipped > 0.5:
            by_case = ", ".join(
                f"{case} {_percent(1 - (of.accuracy or 0.0))}" for case, of in self.after.by_case.items()
            )
            cost = "" if self.cost_elsewhere is None else f", at {self.cost_elsewhere:+.4f} nats a token elsewhere"
            remarks.append(f"flipped: the other answer is ahead on {_percent(self.flipped)} ({by_case}){cost}")
        if (self.answer_share or 0.0) > COMMON:
            remarks.append(
                f"answers of the behaviour are {_percent(self.answer_share or 0.0)} of the text: too common there "
                "to tell their cost apart"
            )
        if self.spread_on_text:
            remarks.append("other text has no spans, and is not generated: there the features are edited at all tokens")
        controls = (("random features at equal norm", self.random_equal_norm),
                    ("random directions at equal norm", self.random_directions),
                    (self._equal_effect_title(), self.random_equal_effect))  # fmt: skip
        remarks += [f"{name}: {self._range(runs)}" for name, runs in controls if runs]
        if self.reversed_cases:
            remarks.append(f"reversed: {', '.join(self.reversed_cases)} (the metric has the other sign after the edit)")
        if self.fluency:
            before, after = self.fluency
            remarks.append(
                f"continuations: perplexity {_number(before.perplexity)} before, {_number(after.perplexity)} after, by "
                f"the model as it is; repeated threes {_percent(before.repetition)}, {_percent(after.repetition)}"
            )
        if self.random_left == 0:
            remarks.append("no random features to compare with: all that are active there are edited")
        return remarks

    def _equal_effect_title(self) -> str:
        """A title for the draws of equal effect, with how near they come."""
        shares = self.equal_effect_shares
        near = f" ({_percent(min(shares))} to {_percent(max(shares))} of it)" if shares else ""
        return f"other features of the circuit, as many and of the same summed |effect|{near}"

    @property
    def is_surgical(self) -> bool | None:
        """Whether a chosen edit leaves at most `SURGICAL_LEFT` at `SURGICAL_COST` of what zeroing the ten strongest
        features costs elsewhere; None where that was not measured.
        """
        of_strongest = None if self.strongest is None else self._cost(self.strongest)
        cost, left = self._cost(self.after), self.remaining
        if of_strongest is None or cost is None or left is None:
            return None
        return abs(left) <= SURGICAL_LEFT and cost <= max(SURGICAL_COST * of_strongest, NO_COST)

    @property
    def cost_elsewhere(self) -> float | None:
        """Cost of the edit at predictions that are none of the behaviour's, nats a token."""
        return self._cost(self.after)

    def _cost(self, run: Behaviour) -> float | None:
        """The cost of a run elsewhere, nats a token."""
        if run.ce_elsewhere is None or self.before.ce_elsewhere is None:
            return None
        return run.ce_elsewhere - self.before.ce_elsewhere

    def _about_choice(self) -> list[str]:
        """How the features were chosen, and whether that is surgical."""
        if self.choice is None:
            return []
        measured = [(self._cost(run), self.left(run)) for run in (self.after, self.strongest) if run is not None]
        return about_choice(self.choice, *measured, surgical=self.is_surgical)

    def _range(self, runs: list[Behaviour]) -> str:
        """The smallest and largest share left by several runs, and their costs elsewhere."""
        shares = [share for share in map(self.left, runs) if share is not None]
        costs = [cost for cost in map(self._cost, runs) if cost is not None]
        left = f"{_percent(min(shares))} to {_percent(max(shares))} left" if shares else ""
        cost = f"CE elsewhere {min(costs):+.3f} to {max(costs):+.3f}" if costs else ""
        return ", ".join(text for text in (left, cost) if text)

    def dose_table(self) -> pd.DataFrame:
        """One row a strength: scale, left, by case, and where there is other text the cost elsewhere and KL."""
        rows = []
        for dose in self.doses:
            run = dose.behaviour
            row: dict[str, Any] = {"scale": dose.scale, "left": self.left(run), self.metric: run.size}
            row |= {case: score.metric for case, score in run.by_case.items()}
            row |= {} if run.ce is None else {"CE elsewhere": self._cost(run), "KL": run.kl}
            rows.append(row)
        return pd.DataFrame(rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{round(100 * share)} %"


def _space(text: str) -> str:
    return " " + " ".join(text.split())
