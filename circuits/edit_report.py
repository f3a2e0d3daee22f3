"""What an edit did, as a record: for JSON, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from sae.errors import UserError
from sae.files import write_json
from sae.tables import aligned

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Score:
    """The behaviour on one group of prompts."""

    n: int
    """Number of prompts."""
    metric: float
    """Mean of logit(clean answer) - logit(patch answer); of logit(clean answer) without pairs."""
    accuracy: float
    """Share of prompts with the right answer ahead of the wrong one; without pairs, ahead of all tokens."""


@dataclass(frozen=True)
class Behaviour:
    """The behaviour of the model, edited or not."""

    overall: Score
    """On all prompts."""
    by_case: dict[str, Score] = field(default_factory=dict)
    """On the prompts of each case, where there are several."""
    ce: float | None = None
    """Cross-entropy on other text, nats a token; None where no text was given."""

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Behaviour:
        """From its plain JSON form."""
        by_case = {case: Score(**score) for case, score in data["by_case"].items()}
        return Behaviour(Score(**data["overall"]), by_case, data["ce"])


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
class EditReport:
    """An edit, what it did, and what the same edit of random features did."""

    features: list[str]
    """The edited features."""
    operation: str
    """`zero`, `mean`, `set`, `scale` or `steer`."""
    value: float | None
    """The value of `set`, `scale` and `steer`."""
    metric: str
    """What `Score.metric` is: `logit difference`, `answer logit` without pairs, or the name of a probe's logit."""
    n_prompts: int
    """Number of prompts measured."""
    n_texts: int
    """Number of other texts measured."""
    before: Behaviour
    """The model as it is."""
    after: Behaviour
    """The edited model."""
    random: list[Behaviour]
    """One entry a draw: as many random features, active on the prompts, given the same edit."""
    random_features: list[list[str]]
    """The features of each draw."""
    continuations: list[Continuation] = field(default_factory=list)
    """Sample continuations before and after."""
    seed: int = 0
    """Seed of the draws."""

    @property
    def remaining(self) -> float:
        """Share of the metric that the edit leaves: after / before, nan where there was none."""
        before = self.before.overall.metric
        return self.after.overall.metric / before if before else float("nan")

    @property
    def random_remaining(self) -> list[float]:
        """The same for each draw of random features."""
        before = self.before.overall.metric
        return [draw.overall.metric / before if before else float("nan") for draw in self.random]

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
            "ce_increase": self.ce_increase,
        }
        return {"schema_version": SCHEMA_VERSION, "kind": "edit", **asdict(self), **derived}

    def save(self, path: str | Path) -> Path:
        """Write it as JSON."""
        write_json(path, self.to_dict())
        return Path(path)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> EditReport:
        """The report that `to_dict` wrote; `UserError` where it is of another kind or version."""
        if data.get("kind") != "edit" or data.get("schema_version") != SCHEMA_VERSION:
            found = f"{data.get('kind')!r}, version {data.get('schema_version')!r}"
            raise UserError(f"not an edit of schema_version {SCHEMA_VERSION}: found {found}")
        own = {name: data[name] for name in (f.name for f in fields(EditReport)) if name in data}
        return EditReport(
            **own
            | {
                "before": Behaviour.from_dict(data["before"]),
                "after": Behaviour.from_dict(data["after"]),
                "random": [Behaviour.from_dict(draw) for draw in data["random"]],
                "continuations": [Continuation(**sample) for sample in data["continuations"]],
            }
        )

    @property
    def runs(self) -> list[Behaviour]:
        """Before, after, and every random draw."""
        return [self.before, self.after, *self.random]

    @property
    def action(self) -> str:
        """What was done to the features, in words: `set to zero`."""
        return {
            "zero": "set to zero",
            "mean": "set to their mean",
            "set": f"set to {self.value}",
            "scale": f"multiplied by {self.value}",
            "steer": f"steered by {self.value}",
        }[self.operation]

    def title(self) -> str:
        """`10 features set to zero on 192 prompts`."""
        n = len(self.features)
        return f"{n} {'feature' if n == 1 else 'features'} {self.action} on {self.n_prompts} prompts"

    def table(self) -> str:
        """Before, after and the random control as aligned text for a terminal."""
        draws = len(self.random)
        head = ["", "before", "after", "left"] + ([f"random features ({draws} draws)", "left"] if draws else [])
        rows = [self._metric_row(self.metric, None)]
        rows += [self._metric_row(f"  {case}", case) for case in self.before.by_case]
        rows.append(self._plain_row("accuracy", [b.overall.accuracy for b in self.runs]))
        for case in self.before.by_case:
            values = [b.by_case[case].accuracy for b in self.runs]
            rows.append(self._plain_row(f"  {case}", values))
        if self.before.ce is not None:
            values = [b.ce or 0.0 for b in self.runs]
            rows.append(self._plain_row(f"CE on {self.n_texts} texts", values, digits=3))
        lines = [self.title(), aligned([head, *rows])]
        for sample in self.continuations:
            lines += ["", sample.prompt, f"  before:{_space(sample.before)}", f"  after: {_space(sample.after)}"]
        return "\n".join(lines)

    def _metric_row(self, name: str, case: str | None) -> list[str]:
        before, after, *drawn = [(run.by_case[case] if case else run.overall).metric for run in self.runs]
        row = [name, f"{before:.2f}", f"{after:.2f}", _share(after, before)]
        return [*row, _range(drawn), _share(sum(drawn) / len(drawn), before)] if drawn else row

    def _plain_row(self, name: str, values: list[float], *, digits: int = 2) -> list[str]:
        before, after, *drawn = values
        row = [name, f"{before:.{digits}f}", f"{after:.{digits}f}", ""]
        return [*row, _range(drawn, digits=digits), ""] if drawn else row


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "-"


def _range(values: Sequence[float], *, digits: int = 2) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.{digits}f} [{min(values):.{digits}f}, {max(values):.{digits}f}]"


def _space(text: str) -> str:
    return " " + " ".join(text.split())
