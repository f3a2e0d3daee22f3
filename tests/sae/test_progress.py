"""Without a terminal, progress is a line for every tenth of the work."""

from __future__ import annotations

from sae._progress import ProgressBar


def test_lines_without_a_terminal(capsys):
    with ProgressBar(total=40, desc="train", mininterval=0) as bar:
        for _ in range(40):
            bar.update()
    list(ProgressBar(range(3), desc="quick"))
    ProgressBar(total=5, disable=True).close()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) <= 11 and lines[-2].startswith("train: 100 % (40 of 40)") and lines[-1].startswith("quick: 100 %")
