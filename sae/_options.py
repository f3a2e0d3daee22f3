"""Ranges of numeric options, stated where the option is: `steps: Annotated[int, Range(1, 1000)] = 10`.

`check_ranges` looks at all fields of a dataclass of options; option classes call it when they are made, the command
line before any work begins, and `--help` shows the ranges. The upper ends refuse what would run for days or what no
machine holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from sae.errors import UserError


@dataclass(frozen=True)
class Range:
    """The numbers that an option may be, ends included."""

    low: float
    """The smallest."""
    high: float
    """The largest."""
    above: bool = False
    """Whether the smallest itself is left out."""

    def __contains__(self, value: float) -> bool:
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low, high = _short(self.low), _short(self.high)
        return f"above {low}, at most {high}" if self.above else f"{low} to {high}"


def _short(end: float) -> str:
    """`1e9` for large powers of ten, else all digits."""
    power = round(math.log10(abs(end))) if end else 0
    return f"{'-' * (end < 0)}1e{power}" if power > 5 and abs(end) == 10**power else f"{end:.15g}"


MANY = 10**9
"""More than any count of prompts, nodes or edges."""
Seed = Annotated[int, Range(0, 2**32 - 1)]
TokenCount = Annotated[int, Range(1, 10**13)]
FeatureCount = Annotated[int, Range(1, 2**31 - 2)]
ContextLength = Annotated[int, Range(2, 10**7)]
BatchSize = Annotated[int, Range(1, 10**6)]
Positive = Annotated[int, Range(1, MANY)]
Count = Annotated[int, Range(0, MANY)]
Gibibytes = Annotated[float, Range(0, 10**6, above=True)]
Magnitude = Annotated[float, Range(0, 10**30)]
LearningRate = Annotated[float, Range(0, 1000, above=True)]
Weight = Annotated[float, Range(0, 10**6)]
Share = Annotated[float, Range(0, 1)]
Activation = Annotated[float, Range(-(10**30), 10**30)]
Repeats = Annotated[int, Range(0, 1000)]
Resamples = Annotated[int, Range(0, 10**6)]
Steps = Annotated[int, Range(1, 1000)]
DescentSteps = Annotated[int, Range(1, 10**5)]


@cache
def ranges(options: Any) -> dict[str, Range]:
    """The ranges of a dataclass's fields, by name; those of inherited fields too."""
    hints = get_type_hints(options, include_extras=True)
    found = {field.name: _range_in(hints[field.name]) for field in fields(options)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


def _range_in(hint: Any) -> Range | None:
    """The range in a type such as `Annotated[int, Range(1, 5)] | None`."""
    if isinstance(hint, Range):
        return hint
    parts = (*hint.__metadata__, hint.__origin__) if get_origin(hint) is Annotated else get_args(hint)
    return next((allowed for part in parts if (allowed := _range_in(part)) is not None), None)


def check_ranges(options: Any) -> None:
    """`UserError` for an option beyond its range, in the options themselves or in options they hold."""
    kind: Any = type(options)
    for name, allowed in ranges(kind).items():
        value = getattr(options, name)
        if value is not None and (math.isnan(value) or value not in allowed):
            raise UserError(f"{name.replace('_', '-')} is {value}: it must be {allowed}")
    for field in fields(options):
        if is_dataclass(value := getattr(options, field.name)):
            check_ranges(value)


def parse_sizes(text: str, option: str = "sizes") -> tuple[int, ...]:
    """`"10,20,50"` -> (10, 20, 50); `UserError` for anything that is not a positive whole number."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in parts if not (part.isascii() and part.isdigit() and len(part) < 10 and int(part))]
    if wrong or not parts:
        raise UserError(f"{option} {text!r}: expected positive whole numbers separated by commas, such as 10,20,50")
    return tuple(int(part) for part in parts)
