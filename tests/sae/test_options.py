"""Options state their ranges, and whatever is beyond them is one sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import pytest

from sae._options import LearningRate, Range, Seed, check_options, parse_sizes
from sae.errors import UserError


@dataclass(frozen=True)
class Inner:
    rate: LearningRate | None = None
    seed: Seed = 0


@dataclass(frozen=True)
class Outer:
    n_nodes: Annotated[int, Range(1, 10**9)] = 1
    share: Annotated[float, Range(-1, 1)] = 0.5
    name: str = "x"
    inner: Annotated[Inner, "flat"] = field(default_factory=Inner)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (Outer(n_nodes=0), "n-nodes is 0: it must be 1 to 1e9"),
        (Outer(n_nodes=10**23), "n-nodes is 1"),
        (Outer(share=float("nan")), "share is nan: it must be -1 to 1"),
        (Outer(share=float("-inf")), "share is -inf"),
        (Outer(inner=Inner(rate=0.0)), "rate is 0.0: it must be above 0, at most 1000"),
        (Outer(inner=Inner(rate=1e308)), "rate is 1e+308"),
        (Outer(inner=Inner(seed=-1)), "seed is -1: it must be 0 to 4294967295"),
    ],
)
def test_numbers_beyond_a_range_are_named(options, said):
    with pytest.raises(UserError) as caught:
        check_options(options)
    assert str(caught.value).startswith(said)


def test_numbers_within_are_taken():
    check_options(Outer(n_nodes=10**9, share=-1, inner=Inner(rate=1000, seed=2**32 - 1)))


@pytest.mark.parametrize("text", ["", "x", "0", "10,-1", "²", "9" * 5000, "1.5"])
def test_sizes(text):
    with pytest.raises(UserError, match="10,20,50"):
        parse_sizes(text)
    assert parse_sizes(" 10, 20,") == (10, 20)
