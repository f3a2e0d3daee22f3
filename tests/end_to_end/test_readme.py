"""The README's Python story runs as it is written, with fewer tokens; its commands have the options it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from circuits.cli.main import COMMANDS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_python_story(tmp_path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    assert "tokens=400_000" in code
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace("tokens=400_000", "tokens=20_000"), "README.md", "exec"), {})
    assert "<svg" in (tmp_path / "circuit.svg").read_text()
    printed = capsys.readouterr().out
    assert "faithfulness" in printed and "logit difference" in printed


@pytest.mark.parametrize("line", [line for line in README.splitlines() if re.match(r"sfc [a-z]+ +--", line)])
def test_commands_parse(sfc, line):
    """Every option of every command line is one that `--help` knows."""
    words = line.split()
    known = sfc(words[1], "--help").out
    for option in (word for word in words if word.startswith("--")):
        assert option in known, f"{words[1]} {option}"


def test_options_in_the_text_exist(sfc):
    """`sfc COMMAND --option` in the text has that option, and `--option` by itself is one of some command."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", README, flags=re.DOTALL))
    text = [span.split() for span in spans if re.search(r"(^|\s)--", span) and not span.startswith("python")]
    helps = {name: sfc(name, "--help").out for name in COMMANDS}
    for words in text:
        known = helps[words[1]] if words[0] == "sfc" and words[1] in helps else "".join(helps.values())
        for option in (word for word in words if word.startswith("--")):
            assert f"{option} " in known or f"{option}\n" in known, " ".join(words)
