"""The example notebook runs from top to bottom."""

from __future__ import annotations

import importlib.util
from dataclasses import replace

import pytest
from nnsight._c import unmount

import sae


def run_tour() -> None:
    """In a process that has imported nnsight, which gives every object a method `save`; marimo's import refuses it."""
    if unmount is not None:
        unmount("save")
    from examples.tour import app

    train = sae.train_saes
    sae.train_saes = lambda *given, config, **options: train(*given, config=replace(config, tokens=2000), **options)
    _, defined = app.run()
    circuit, widget = defined["circuit"], defined["explorer"].widget
    assert defined["features"] == circuit.strongest_features(5) and defined["edit"].features
    assert "faithfulness" in defined["curve"].text()
    widget.selected = defined["features"][:1]
    assert widget.selected.circuit is circuit


@pytest.mark.slow
def test_the_tour_runs_and_edits_what_is_selected(forked):
    missing = [name for name in ("marimo", "anywidget") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = forked.call(run_tour)
    assert done.status == 0, done.err
