"""Who says which features of a probe's circuit it should not use: true for each feature that is to be ablated.

1. A person: a file of names.
2. Keywords: a regular expression on a feature's label, or else on its top tokens.
3. Correlation: with the spurious label on texts of which nothing else is known.
4. A program, which reads a JSON object a line on its standard input and answers `keep` or `drop`, one a line.
5. Any Python function of the features.

    {"feature": "resid_0/81", "effect": 3.07, "label": "", "tokens": ["car", "boat"],
     "contexts": ["The kings near the «car»"], "by_class": {"plural": 0.1, "singular": 3.2}}

Shapes: B texts, n features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from circuits.debiasing.data import TextSet
from circuits.debiasing.describe import activations
from circuits.debiasing.options import ShiftOptions
from circuits.debiasing.probing import Study
from circuits.debiasing.results import JudgedFeature
from sae._files import read_text
from sae._run.programs import ask
from sae.errors import UserError

Judge = Callable[[Sequence[JudgedFeature]], Sequence[bool]]
SHOWN_KEYS = ("feature", "effect", "label", "tokens", "contexts", "by_class")
"""What a program is told of a feature."""


def judge_name(options: ShiftOptions, concept: object | None, judge: Judge | None) -> str:
    """The judge's name in the report."""
    given = {"list": options.drop, "keywords": options.keywords, "concept": concept,
             "program": options.program, "function": judge}  # fmt: skip
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise UserError(f"{' and '.join(names)} are two judges: give one")
    return names[0] if names else "none"


def judged(
    features: Sequence[JudgedFeature], study: Study, concept: TextSet | None, judge: Judge | None
) -> list[JudgedFeature]:
    """The features with what the judge of the options, or a function, says of each."""
    options = study.options
    if judge is not None:
        verdicts = [bool(drop) for drop in judge(features)]
        if len(verdicts) != len(features):
            raise UserError(f"the judge gave {len(verdicts)} answers for {len(features)} features")
        return _with(features, verdicts, ["function"] * len(features))
    if options.drop is not None:
        return by_list(features, options.drop)
    if options.keywords is not None:
        return by_keywords(features, options.keywords)
    if options.program is not None:
        verdicts = by_program(features, options.program, options.timeout)
        return _with(features, verdicts, ["program"] * len(features))
    return list(features) if concept is None else by_concept(features, study, concept)


def _with(features: Sequence[JudgedFeature], drops: Sequence[bool], why: Sequence[str]) -> list[JudgedFeature]:
    return [replace(one, dropped=drop, reason=reason) for one, drop, reason in zip(features, drops, why, strict=True)]


def by_list(features: Sequence[JudgedFeature], path: Path) -> list[JudgedFeature]:
    """Drop the features listed in a file; a name without a span is meant at every span."""
    lines = [line.partition("#")[0].strip() for line in read_text(path).splitlines()]
    names = {line for line in lines if line}
    allowed = {name for one in features for name in (one.feature, one.feature.partition("@")[0])}
    if strange := sorted(names - allowed):
        raise UserError(
            f"{path}: {strange[0]!r} is none of the {len(features)} features that are judged, such as "
            f"{features[0].feature if features else 'resid_3/120'}: raise --features, or take it out"
        )
    drops = [bool({one.feature, one.feature.partition("@")[0]} & names) for one in features]
    return _with(features, drops, ["listed" if drop else "not listed" for drop in drops])


def by_keywords(features: Sequence[JudgedFeature], pattern: str) -> list[JudgedFeature]:
    """Drop the features whose label, or without one top tokens, match the pattern, whatever the case."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"keywords {pattern!r} is not a regular expression: {error}") from None
    matches = [compiled.search(one.label or " ".join(one.tokens)) for one in features]
    return _with(
        features, [match is not None for match in matches], [match.group() if match else "" for match in matches]
    )


def by_concept(features: Sequence[JudgedFeature], study: Study, concept: TextSet) -> list[JudgedFeature]:
    """Drop the features whose activation correlates with the spurious label at least as much as the threshold says."""
    spurious = torch.tensor([label == study.pairing.spurious[1] for label in concept.spurious]).float()
    f = activations(study.model, study.saes, [one.feature for one in features], concept.prompts)
    r = correlation(f, spurious).tolist()
    return _with(features, [abs(value) >= study.options.threshold for value in r], [f"r = {value:+.2f}" for value in r])


def correlation(f: Tensor, label: Tensor) -> Tensor:
    """Pearson's r of each column of f [B, n] with a label [B], 0 where one of them is constant."""
    f, label = f.double() - f.double().mean(0), label.double() - label.double().mean()
    size = f.norm(dim=0) * label.norm()
    return torch.where(size > 1e-9, (label @ f) / size.clamp(min=1e-9), 0.0).float()


def by_program(features: Sequence[JudgedFeature], command: str, timeout: float) -> list[bool]:
    """Drop the features that a program answers to; UserError where it cannot be run, takes too long, or answers
    something else.
    """
    shown = [{key: asdict(one)[key] for key in SHOWN_KEYS} for one in features]
    answers = [line.lower() for line in ask(command, shown, timeout=timeout, called="the judge")]
    wrong = next((answer for answer in answers if answer not in ("keep", "drop")), None)
    if wrong is not None or len(answers) != len(features):
        what = f"{wrong[:60]!r}" if wrong is not None else f"{len(answers)} lines"
        raise UserError(f"the judge {command!r} answered {what}: expected keep or drop on {len(features)} lines")
    return [answer == "drop" for answer in answers]
