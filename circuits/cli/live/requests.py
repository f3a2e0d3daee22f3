"""Requests of a page: each is one of these records, checked before anything is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from circuits.options import Freeze
from sae._files import check_type

Text = Annotated[str, Field(max_length=100_000)]
Name = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True)
class LookAt:
    """A prompt to read, and the next token that features are held responsible for."""

    prompt: Text
    answer: int | Text | None = None
    """The next token, its id or as text; the most probable one by default."""
    against: int | Text | None = None
    """The token it is compared with; the most probable other one by default."""


@dataclass(frozen=True)
class TryEdit:
    """An edit of the model while it reads and continues a prompt."""

    prompt: Text
    answer: int
    against: int
    features: Annotated[list[Name], Field(min_length=1, max_length=500)]
    """Names such as `resid_3/120`."""
    operation: Literal["zero", "mean", "set", "scale", "steer"] = "zero"
    value: float | None = None
    where: Literal["everywhere", "generated"] | Annotated[int, Field(ge=0)] = "everywhere"
    """At all tokens, at generated ones alone, or at the prompt's token of this number."""
    freeze: Freeze | None = None
    """Whether attention follows the edit."""
    new_tokens: Annotated[int, Field(ge=0, le=200)] = 30
    """Length of the continuations."""


@dataclass(frozen=True)
class FindCircuit:
    """A minimal pair whose circuit is looked for."""

    clean: Text
    patch: Text
    clean_answer: Text
    patch_answer: Text


@dataclass(frozen=True)
class NameFeature:
    """A label for a feature; an empty label takes the name away."""

    feature: Name
    label: Name


REQUESTS: dict[str, Any] = {"prompt": LookAt, "edit": TryEdit, "circuit": FindCircuit, "label": NameFeature}
"""Records by what they ask for."""


def read_request(kind: str, body: Any) -> Any:
    """The record of a request. Raises UserError for a value that does not fit."""
    return check_type(body, REQUESTS[kind], "the request")
