"""The script of a GPU day runs to its end in small, and goes on where it was cut off."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import traceback

import pytest

from tests.benchmarks import gpu
from tests.workers import fork


def in_a_fork(words, folder):
    """What `gpu.run` gives, by a fork of this process, which has imported everything."""
    file = folder / "output"
    pid = fork()
    if pid == 0:
        output, status = io.StringIO(), 0
        try:
            sys.argv = list(words)
            with contextlib.redirect_stdout(output):
                runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = int(end.code or 0)
        except BaseException:
            status = 1
            output.write(traceback.format_exc())
        file.write_text(output.getvalue())
        os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"words": list(words), "status": status, "seconds": 0.0, "output": file.read_text()}


def test_every_step_runs_in_small(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton")
    ran = []

    def run(words):
        ran.append(words[0])
        return in_a_fork(words, tmp_path)

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu", "--small", "--out", str(tmp_path / "gpu.json")])
    for expected in (len(gpu.SMALL), 0):  # the second time nothing is left to do
        ran.clear()
        with pytest.raises(SystemExit) as end:
            gpu.main()
        said = capsys.readouterr().out
        assert end.value.code == 0, said
        assert len(ran) == expected
    results = json.loads((tmp_path / "gpu.json").read_text())
    difference = json.loads(results["kernels"]["output"].splitlines()[-1])["largest difference"]
    assert 0 <= difference < 1e-4
    assert "tokens/s" in results["training"]["output"] and "attrib" in results["scale"]["output"]
    assert set(gpu.SMALL) == set(gpu.LARGE)
