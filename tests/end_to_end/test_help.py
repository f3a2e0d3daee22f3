"""`sfc --help` and `sfc COMMAND --help` answer at once: no slow library is imported, and help fits where it is read."""

from __future__ import annotations

import subprocess
import sys

import pytest

from circuits.cli.main import COMMANDS, overview

SLOW = ("torch", "transformers", "nnsight", "datasets", "pandas", "numpy", "matplotlib", "sklearn", "scipy", "networkx")
HELP_OF_ALL = f"""
import contextlib, io, sys, time
begin = time.process_time()
from circuits.cli.main import COMMANDS, main
for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.suppress(SystemExit):
        main(words)
    assert len(said.getvalue()) > 400, words
    slow = [name for name in {SLOW} if name in sys.modules]
    assert not slow, (words, slow)
print(time.process_time() - begin)
"""


@pytest.mark.slow
def test_help_imports_no_slow_library():
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_overview_fits_on_a_screen():
    lines = overview().splitlines()
    assert 24 <= len(lines) <= 40 and max(map(len, lines)) <= 80
    assert all(any(line.split()[:1] == [name] for line in lines) for name in COMMANDS)


def test_help_is_wrapped_evenly(sfc):
    said = sfc("discover", "--help").out
    assert "{None}" not in said and "default: None" not in said and "default: False" not in said


def test_usage_errors_are_one_sentence(sfc):
    out = ("--out", "x")
    for words, sentence in (
        (["discver"], "unknown command 'discver'; did you mean 'discover'? (see sfc --help)"),
        (["train", "--modl", "a", *out], "unknown option '--modl'; did you mean '--model'? (see sfc train --help)"),
        (["train", *out, "--features", "x"], "--features is 'x': expected a whole number (see sfc train --help)"),
        (["train", *out, "--sparsity=x"], "--sparsity is 'x': expected a number (see sfc train --help)"),
        (["train", "--out"], "--out has no value: give one (see sfc train --help)"),
        (["cache", *out], "--model and --text are missing (see sfc cache --help)"),
        (["train", *out, "--finetune", "kll"],
         "unknown finetune 'kll': allowed are none, kl, ce; did you mean 'kl'? (see sfc train --help)"),
        (["train", *out, "text.txt"],
         "'text.txt' stands where an option is expected, such as --out (see sfc train --help)"),
        (["train", *out, "--features", "4", "--k", "5"],
         "features is 4 and k is 5: k is at most the number of features"),
    ):  # fmt: skip
        result = sfc(*words)
        assert (result.status, result.err) == (2, f"sfc: {sentence}\n"), words
