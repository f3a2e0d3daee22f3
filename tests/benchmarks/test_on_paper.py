"""The table of `docs/scale.md` is the one that the arithmetic gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.on_paper import Plan, table

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"


def test_the_page_has_the_table():
    assert "\n".join(table()) in PAGE.read_text()


def test_a_measured_step_is_what_it_is_on_paper():
    measured = 8.9e-3  # on an H200, tests/benchmarks/README.md
    step = sum(Plan("", width=2304, sites=1, parameters=0, features=65_536).parts().values())
    assert step == pytest.approx(measured, rel=0.1)
