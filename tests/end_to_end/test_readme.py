"""Every Python block of the README and of docs runs as it is written; every command there has the options it names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from circuits.cli.main import COMMANDS, command_class
from circuits.cli.parser import option_names
from sae.errors import UserError

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tests/benchmarks/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
FENCE = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
SHORTER = {
    "features=256, k=8, tokens=400_000": "features=64, k=8, tokens=1500",
    "limit=100": "limit=10",
    'test.jsonl", model)': 'test.jsonl", model, limit=8)',
}


def python_blocks():
    for page in PAGES:
        for number, (language, code) in enumerate(FENCE.findall(page.read_text(encoding="utf-8"))):
            if language == "python":
                yield pytest.param(code, id=f"{page.relative_to(ROOT)}-{number}")


@pytest.mark.slow
@pytest.mark.parametrize("code", list(python_blocks()))
def test_python_blocks_run(code, tmp_path, monkeypatch):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for long, short in SHORTER.items():
        code = code.replace(long, short)
    exec(compile(code, "page", "exec"), {})
    if "circuit.svg" in code:
        assert "<svg" in (tmp_path / "circuit.svg").read_text()


def test_the_front_doors_story_is_short():
    code = next(code for language, code in FENCE.findall(PAGES[0].read_text(encoding="utf-8")) if language == "python")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 15 and sum("import" in line for line in lines) <= 3
    assert len(PAGES[0].read_text(encoding="utf-8").split()) <= 1200
    assert len(list((ROOT / "docs").iterdir())) <= 5


def commands(text: str):
    """The words of every `sfc COMMAND ...` of a page, in blocks and in the text."""
    lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
    spans = re.findall(r"`([^`]+)`", FENCE.sub("", text))
    for words in (span.split() for span in (*lines, *spans)):
        if words[:1] == ["sfc"] and len(words) > 1 and words[1] in COMMANDS:
            yield words[1], words[2:]
        elif words[:1] and words[0].startswith("--"):
            yield None, words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_exist(page):
    options = {name: {"--help", *option_names(command_class(name))} for name in COMMANDS}
    everywhere = set().union(*options.values()) | BENCHMARKS
    for command, words in commands(page.read_text(encoding="utf-8")):
        allowed = everywhere if command is None else options[command]
        assert not [word for word in words if word.startswith("--") and word not in allowed], (command, words)


BENCHMARKS = {
    "--peer", "--layers", "--threads", "--clock", "--rates", "--width", "--batch", "--only", "--small", "--sparsify",
    "--starts", "--steer", "--task",
}  # fmt: skip
"""Options of scripts in tests/benchmarks."""


def test_lines_of_the_command_story_parse(monkeypatch):
    """The command line takes every line of the README's story up to the point where it begins to work."""
    from circuits.cli.parser import parse

    for command, words in commands(PAGES[0].read_text(encoding="utf-8")):
        if command and len(words) > 3:
            try:
                parse(command_class(command), words, prog="sfc")
            except UserError as error:
                assert "missing" in str(error), words
