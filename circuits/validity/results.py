"""Results of `sfc validate`: a verdict a line with its number and its interval, and the tables behind them.

A number is held against a bar. It *holds* where its whole interval is on the right side of the bar, *fails* where the
whole interval is on the wrong one, and is *doubtful* where the bar is inside; without an interval the number alone
decides, and where there is no number nothing is told.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import pandas as pd

from circuits._results import format_interval, format_number
from circuits.validity.overlap import Interval
from sae._frames import Result, frame_text

Verdict = Literal["holds", "doubtful", "fails", "untold"]


@dataclass(frozen=True)
class Check:
    """One line of the report."""

    name: str
    """A short name: faithfulness, prompts, resamples, ..."""
    question: str
    """The question."""
    verdict: Verdict
    """The verdict on the number."""
    words: str
    """The same in a sentence."""
    value: float | None = None
    """The number."""
    interval: Interval | None = None
    """95 % interval of the number."""
    bar: float | None = None
    """The number it is held against."""


def judge(value: float, bar: float, interval: Interval | None = None, *, at_most: bool = False) -> Verdict:
    """Whether a number holds against a bar that it has to reach, or with `at_most` must not pass."""
    if value != value:
        return "untold"
    low, high = interval or (value, value)
    sides = [end <= bar if at_most else end >= bar for end in (low, high)]
    return "holds" if all(sides) else "doubtful" if any(sides) else "fails"


@dataclass(frozen=True)
class Families:
    """Prompts in families of like effects, and what the circuit of each explains of each."""

    labels: list[int]
    """The family of each prompt of the discovery, from 0, the largest first."""
    likeness: float | None
    """Mean cosine of the effects of two prompts; None where there are too few prompts."""
    silhouette: float | None
    """Mean silhouette of the split; None for one family."""
    sizes: list[int]
    """Prompts of each family."""
    cases: list[dict[str, int]]
    """Prompts of each case, for each family."""
    templates: list[dict[str, int]]
    """Prompts of each template, for each family."""
    examples: list[str]
    """The prompt of each family that is most like the others."""
    faithfulness: list[list[float]]
    """[family measured on][family whose circuit it is]; empty for one family."""
    names: list[list[str]]
    """Nodes that are in the circuit of one family alone, for each family; strongest first."""


@dataclass(frozen=True)
class Backups:
    """Nodes that take over when the strongest are ablated."""

    removed: int
    """How many of the strongest nodes were ablated."""
    names: list[str]
    """Nodes whose effect grows most, the first most."""
    before: list[float]
    """Their effect with nothing ablated."""
    after: list[float]
    """Their effect with the strongest ablated."""
    left: float
    """Share of the behaviour that is left without the strongest (completeness)."""
    left_without_backups: float | None
    """Share left without the strongest and these; None where nothing grows."""
    left_without_next: float | None
    """Share left without the strongest and as many of the next strongest."""


@dataclass(frozen=True)
class WorstPrompt:
    """A prompt of which the circuit explains little."""

    text: str
    """The clean prompt."""
    case: str
    """Its case."""
    faithfulness: float
    """The circuit's share of its metric."""


@dataclass(frozen=True)
class PromptSpread:
    """Faithfulness prompt by prompt."""

    quartiles: list[float]
    """The lower quartile, the median and the upper one."""
    worst: list[WorstPrompt]
    """The prompts of which the circuit explains least, the worst first."""
    left_out: int
    """Prompts on which ablation changes the metric too little for a share to mean something."""


@dataclass(frozen=True)
class Validity(Result):
    """How far to trust a circuit."""

    checks: list[Check]
    """A line each."""
    nodes: int
    """Nodes of the circuit that was looked at, its strongest."""
    n_prompts: int
    """Prompts that faithfulness was measured on."""
    drawn: str
    """The units that intervals draw anew, `100 prompts drawn by their 17 templates`."""
    families: Families | None = None
    """Families of prompts; None for prompts too few."""
    backups: Backups | None = None
    """Nodes that take over; None where that was not asked for."""
    prompts: PromptSpread | None = None
    """Faithfulness prompt by prompt."""

    def check(self, name: str) -> Check:
        """The line of that name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return {"schema_version": 1, **asdict(self)}

    def to_frame(self) -> pd.DataFrame:
        """One row a check: name, verdict, value, the ends of its interval, bar and words."""
        rows = [
            {
                "check": check.name, "verdict": check.verdict, "value": check.value,
                "low": None if check.interval is None else check.interval[0],
                "high": None if check.interval is None else check.interval[1], "bar": check.bar, "words": check.words,
            }
            for check in self.checks
        ]  # fmt: skip
        return pd.DataFrame(rows)

    def text(self) -> str:
        """A line a check, then the families, the backups and the worst prompts."""
        head = f"the {self.nodes} strongest nodes on {self.n_prompts} prompts; 95 % intervals over {self.drawn}"
        return "\n".join([head, *map(_line, self.checks), *self._families(), *self._backups(), *self._worst()])

    def _families(self) -> Iterable[str]:
        families = self.families
        if families is None or not families.faithfulness:
            return
        yield "faithfulness of each family's circuit (columns) on each family (rows)"
        columns = {f"of {number + 1}": row for number, row in enumerate(zip(*families.faithfulness, strict=True))}
        names = [f"family {number + 1}, {size} prompts" for number, size in enumerate(families.sizes)]
        yield frame_text(pd.DataFrame({"on": names, **columns}), dict.fromkeys(columns, 2))

    def _backups(self) -> Iterable[str]:
        backups = self.backups
        if backups is None or not backups.names:
            return
        yield f"effects that grow most when the {backups.removed} strongest nodes are ablated"
        table = {"node": backups.names, "before": backups.before, "after": backups.after}
        yield frame_text(pd.DataFrame(table).head(5))

    def _worst(self) -> Iterable[str]:
        if self.prompts is None or not self.prompts.worst:
            return
        yield "prompts of which it explains least"
        rows = [(prompt.text, prompt.case, prompt.faithfulness) for prompt in self.prompts.worst]
        yield frame_text(pd.DataFrame(rows, columns=["prompt", "case", "faithfulness"]).head(5))


def _line(check: Check) -> str:
    number = format_number(check.value)
    interval = "" if check.interval is None else f" {format_interval(check.interval)}"
    return f"{check.verdict:9} {check.name}: {number}{interval}; {check.words}"
