"""Ranges and choices of options, stated in types: `steps: Annotated[int, Range(1, 1000)] = 10`, `rule: Literal["a"]`.

`check_options` looks at all fields of a dataclass of options; option classes call it when they are made, the command
line before any work begins, and `--help` shows ranges and choices. The upper ends refuse what would run for days or
what no machine holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from sae.errors import UserError, unknown


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
def ranges(options: type) -> dict[str, Range]:
    """The ranges of a dataclass's fields, by name; those of inherited fields too."""
    limits = {name: _range_in(hint) for name, hint in field_types(options).items()}
    return {name: limit for name, limit in limits.items() if limit is not None}


@cache
def choices(options: type) -> dict[str, tuple[Any, ...]]:
    """The values that a dataclass's fields of `Literal` type may have, by name."""
    return {name: allowed for name, hint in field_types(options).items() if (allowed := _choices_in(hint))}


@cache
def field_types(options: Any) -> dict[str, Any]:
    """The types of a dataclass's fields with their annotations, by name."""
    hints = get_type_hints(options, include_extras=True)
    return {field.name: hints[field.name] for field in fields(options)}


def _inside(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or a type and its annotations."""
    return (*hint.__metadata__, hint.__origin__) if get_origin(hint) is Annotated else get_args(hint)


def _range_in(hint: Any) -> Range | None:
    """The range in a type such as `Annotated[int, Range(1, 5)] | None`."""
    if isinstance(hint, Range):
        return hint
    if get_origin(hint) is Literal:
        return None
    return next((limit for inner in _inside(hint) if (limit := _range_in(inner)) is not None), None)


def _choices_in(hint: Any) -> tuple[Any, ...]:
    """The values of a type such as `Literal["kl", "ce"] | None`, but None; none for any other type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    return next((allowed for inner in _inside(hint) if (allowed := _choices_in(inner))), ())


def check_options(options: Any) -> None:
    """Raise UserError for an option beyond its range or choices, in the options themselves or in options they hold."""
    kind: Any = type(options)
    for name, allowed in choices(kind).items():
        value = getattr(options, name)
        if value is not None and value not in allowed:
            raise unknown(name.replace("_", "-"), str(value), allowed)
    for name, limit in ranges(kind).items():
        value = getattr(options, name)
        if value is not None and (math.isnan(value) or value not in limit):
            raise UserError(f"{name.replace('_', '-')} is {value}: it must be {limit}")
    for field in fields(options):
        if is_dataclass(value := getattr(options, field.name)):
            check_options(value)


def parse_sizes(text: str, option: str = "sizes") -> tuple[int, ...]:
    """`"10,20,50"` -> (10, 20, 50); `UserError` for anything that is not a positive whole number."""
    sizes = [size.strip() for size in text.split(",") if size.strip()]
    wrong = [size for size in sizes if not (size.isascii() and size.isdigit() and len(size) < 10 and int(size))]
    if wrong or not sizes:
        raise UserError(f"{option} {text!r}: expected positive whole numbers separated by commas, such as 10,20,50")
    return tuple(int(size) for size in sizes)
