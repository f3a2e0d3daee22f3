"""The example notebook runs from top to bottom."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

RUN = """
from examples.tour import app
_, defined = app.run()
circuit, widget = defined["circuit"], defined["explorer"].widget
assert defined["features"] == circuit.strongest_features(5) and defined["edit"].features
assert "faithfulness" in defined["curve"].text()
widget.selected = defined["features"][:1]
assert widget.selected.circuit is circuit
"""


def test_the_tour_runs_and_edits_what_is_selected():
    missing = [name for name in ("marimo", "anywidget") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
