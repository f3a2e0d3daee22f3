"""The example notebook runs from top to bottom."""

from __future__ import annotations

import pytest


def test_the_tour_runs_and_edits_what_is_selected():
    pytest.importorskip("marimo")
    pytest.importorskip("anywidget")
    from examples.tour import app

    _, defined = app.run()
    assert defined["features"] == defined["circuit"].strongest_features(5)
    assert len(defined["edit"].features) >= 1 and "faithfulness" in defined["curve"].text()
    widget = defined["explorer"].widget
    widget.selected = [defined["features"][0]]
    assert widget.selected.circuit is defined["circuit"]
