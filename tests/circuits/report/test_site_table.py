"""The axis of unexplained variance, by hand."""

from __future__ import annotations

import pytest

from circuits.report.files import RunFiles
from circuits.report.site_table import AXIS, site_table


def table(**explained: float | None):
    sites = {site: {"explained_variance": value} for site, value in explained.items()}
    empty = dict.fromkeys(("graph", "faithfulness", "edge_faithfulness"))
    return site_table(RunFiles("run", **empty, masks=[], edits={}, saes=[], evaluation={"sites": sites}))


def test_decades_are_equally_far_apart_and_hold_all_sites():
    found = table(attn_1=None, resid_0=0.9, embed=0.995)
    assert [row.site for row in found.rows] == ["embed", "resid_0", "attn_1"] and found.first == -3
    assert [label for _, label in found.ticks] == [".001", ".01", ".1", "1"]
    ends = [8.0, AXIS - 8.0]
    assert [place for place, _ in found.ticks] == pytest.approx(
        [ends[0], ends[0] + 134 / 3, ends[1] - 134 / 3, ends[1]]
    )
    assert found.x(10**-1.5) == pytest.approx(sum(ends) / 2)
    assert [found.x(share) for share in (1e-9, 0.0, 7.0, None)] == pytest.approx([*ends[:1] * 2, ends[1], AXIS])


def test_the_axis_has_one_to_four_decades():
    lowest = [table(embed=explained).first for explained in (-0.5, 0.3, 1.0, 1 - 1e-7)]
    assert lowest == [-1, -1, -1, -4]
    assert table() is None
