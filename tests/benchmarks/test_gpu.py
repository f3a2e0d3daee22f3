"""The script of a GPU day runs to its end in small, and goes on where it was cut off."""

from __future__ import annotations

import io
import json
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial

import pytest

from tests.benchmarks import gpu
from tests.benchmarks.kernel_times import other_tiles
from tests.sae.sparse.test_kernels import patch_interpreter


def run_module(words):
    """`python -m`, in this process; so is what it runs in processes of its own."""
    patch_interpreter(pytest.MonkeyPatch())
    sys.argv, subprocess.run = list(words), run_here
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run_here(command, **_):
    with redirect_stdout(io.StringIO()) as said:
        run_module(command[2:])
    return subprocess.CompletedProcess(command, 0, said.getvalue().encode())


@pytest.mark.slow
def test_every_step_runs_in_small(tmp_path, monkeypatch, capsys, forked):
    """In forks of a process that has imported everything and in which no thread of autograd has started."""
    pytest.importorskip("triton")
    ran = []

    def run(words):
        ran.append(words[0])
        done = forked.call(partial(run_module, words))
        return {
            "words": list(words),
            "status": done.status,
            "seconds": 0.0,
            "output": done.out + done.err * bool(done.status),
        }

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


def test_other_tiles_change_what_the_kernels_have():
    kernels = pytest.importorskip("sae.sparse.triton_kernels")
    for _, values in other_tiles():
        assert values and all(type(value) is type(getattr(kernels, name)) for name, value in values.items())
