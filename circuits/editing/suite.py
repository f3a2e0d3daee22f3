"""Behaviours that a model has to show, listed in a YAML file and tested as one tests software.

    model: examples/agreement/model
    saes: runs/demo                              # where edits are tested
    text: examples/agreement/text/valid.txt      # where their cost is
    behaviours:
      - name: agreement across a phrase
        prompts: examples/agreement/prompts/nounpp/test.jsonl
        expect: {accuracy: ">= 0.9", logit_difference: ">= 3"}
      - name: number is edited away
        prompts: examples/agreement/prompts/nounpp/test.jsonl
        edit: runs/demo/edits/surgical.json
        expect: {left: "<= 0.15", ce_elsewhere: "<= 0.03"}

Paths are relative to the file. What can be expected: `accuracy` and `logit_difference` (its mean over cases), of
the edited model where there is an edit; `worst_accuracy`, of the case in which it is lowest; and of an edit `left`,
`ce_increase`, `ce_elsewhere` (both what it adds, in nats a token) and `kl`. A model that gives the wrong answers has a
logit difference below zero; as `logit_difference` and `left` are to be at most so much it is their mean size that
counts, so that a behaviour that is turned round is not one that is gone.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import FiniteFloat, PositiveInt
from typing_extensions import NotRequired, TypedDict

from circuits.editing.declaration import load_edits
from circuits.editing.edit import EditOptions, prepare_trial
from circuits.editing.results import EditReport
from circuits.prompts.dataset import load_prompts
from sae._files import check_type
from sae._yaml import read_yaml
from sae.autoencoder import SparseAutoencoder
from sae.data.text import TextSource
from sae.errors import UserError, unknown
from sae.model.language_model import LanguageModel
from sae.model.sites import Site

TEXTS = 200
COMPARISONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


class BehaviourFile(TypedDict):
    """A behaviour of a suite."""

    name: str
    prompts: str
    examples: NotRequired[PositiveInt]
    edit: NotRequired[str]
    expect: dict[str, str | FiniteFloat]


class SuiteFile(TypedDict):
    """A suite."""

    model: str
    saes: NotRequired[str]
    text: NotRequired[str]
    texts: NotRequired[PositiveInt]
    behaviours: list[BehaviourFile]


@dataclass(frozen=True)
class Check:
    """One expectation, and what was found."""

    behaviour: str
    """The behaviour's name."""
    quantity: str
    """Name of the measured quantity."""
    value: float | None
    """Its value; None where it could not be measured."""
    expected: str
    """The value or bounds it should have."""
    passed: bool
    """Whether it is."""


@dataclass(frozen=True)
class Suite:
    """A suite that has been read."""

    folder: Path
    """Folder that its paths are relative to."""
    content: SuiteFile
    """Content of the file."""

    @staticmethod
    def load(path: str | Path) -> Suite:
        """Read a suite; `UserError`, naming file and key, for anything that does not fit."""
        data = read_yaml(path)
        content: SuiteFile = check_type(data, SuiteFile, path)
        _check_keys(data, SuiteFile, str(path))
        if not data["behaviours"]:
            raise UserError(f"{path}: behaviours is empty: list some, or there is nothing to test")
        for number, behaviour in enumerate(data["behaviours"]):
            where = f"{path}: behaviours[{number}]"
            _check_keys(behaviour, BehaviourFile, where)
            if not behaviour["expect"]:
                raise UserError(f'{where}: expect is empty: say what is expected, as {{accuracy: ">= 0.9"}}')
            for quantity, expected in behaviour["expect"].items():
                if quantity not in QUANTITIES:
                    raise UserError(f"{where}: {unknown('quantity', quantity, QUANTITIES)}")
                _comparison(expected, where)
            if "edit" in behaviour and "saes" not in content:
                raise UserError(f"{where}: an edit needs autoencoders: give the suite saes")
        return Suite(Path(path).parent, content)

    def path(self, name: str) -> str:
        """A path of the file, from where we are; a hub name as it is."""
        inside = self.folder / name
        return str(inside) if inside.exists() else name

    def run(self, model: LanguageModel, saes: Mapping[Site, SparseAutoencoder] | None) -> Iterator[Check]:
        """Test every behaviour; one check an expectation, as they come."""
        text = self.content.get("text")
        n = self.content.get("texts", TEXTS)
        texts = list(islice(TextSource.of(self.path(text)).read(), n)) if text else []
        for behaviour in self.content["behaviours"]:
            edits = load_edits(self.path(behaviour["edit"])) if "edit" in behaviour else []
            prompts = load_prompts(self.path(behaviour["prompts"]), model, limit=behaviour.get("examples"))
            options = EditOptions(texts=texts if edits else (), n_random=0, resamples=0)
            report = prepare_trial(model, saes or {}, edits, prompts, options).report()
            for quantity, expected in behaviour["expect"].items():
                compare, bound = _comparison(expected, behaviour["name"])
                value = QUANTITIES[quantity](report)
                if quantity in SIZES and bound >= 0 and compare in (operator.le, operator.lt):
                    value = SIZES[quantity](report)
                passed = value is not None and compare(value, bound)
                yield Check(behaviour["name"], quantity, value, _told(expected), passed)


QUANTITIES: dict[str, Callable[[EditReport], float | None]] = {
    "accuracy": lambda report: report.after.overall.accuracy,
    "worst_accuracy": lambda report: min(
        (score.accuracy for score in report.after.by_case.values() if score.accuracy is not None),
        default=report.after.overall.accuracy,
    ),
    "logit_difference": lambda report: report.after.mean,
    "left": lambda report: report.remaining,
    "ce_increase": lambda report: report.ce_increase,
    "ce_elsewhere": lambda report: report.cost_elsewhere,
    "kl": lambda report: report.after.kl,
}
"""What can be expected -> how it is read off a report."""
SIZES: dict[str, Callable[[EditReport], float | None]] = {
    "logit_difference": lambda report: abs(report.after.size),
    "left": lambda report: None if report.remaining is None else abs(report.remaining),
}
"""The same where it is to be at most so much."""


def _check_keys(data: Mapping[str, Any], schema: Any, where: str) -> None:
    """`UserError` for a key that means nothing, such as a misspelt one."""
    for key in data:
        if key not in schema.__annotations__:
            raise UserError(f"{where}: {unknown('key', str(key), schema.__annotations__)}")


def _comparison(expected: str | float, where: str) -> tuple[Callable[[float, float], bool], float]:
    """`">= 0.9"` as a comparison and a bound; a number alone is the least that is expected."""
    match = re.fullmatch(r"\s*(>=|<=|>|<)?\s*(-?\d+(?:\.\d+)?(?:e-?\d+)?)\s*", str(expected))
    if match is None:
        raise UserError(f'{where}: expected {str(expected)!r}: write a bound such as ">= 0.9" or "<= 0.15"')
    return COMPARISONS[match[1] or ">="], float(match[2])


def _told(expected: str | float) -> str:
    return expected.strip() if isinstance(expected, str) and not expected.strip()[0].isdigit() else f">= {expected}"


def to_dict(checks: list[Check]) -> dict[str, Any]:
    """The checks as JSON values."""
    return {"schema_version": 1, "kind": "suite", "passed": all(check.passed for check in checks),
            "checks": [asdict(check) for check in checks]}  # fmt: skip
