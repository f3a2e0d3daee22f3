"""Standard output that is closed, full, a broken pipe or not UTF-8."""

from __future__ import annotations

import io
import os
import sys

import pytest

from circuits.cli.main import main
from circuits.cli.streams import prepare_streams, say


def test_characters_that_an_encoding_lacks_are_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    say("über ☃")
    assert stream.buffer.getvalue() == b"\\xfcber \\u2603"


def test_a_closed_output_takes_everything(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    prepare_streams()
    say("x")


@pytest.mark.parametrize(("kind", "raised"), [("pipe", None), ("full", OSError)])
def test_a_reader_that_has_gone_is_no_failure_and_a_full_disk_is_one(monkeypatch, kind, raised):
    if kind == "pipe":
        reading, writing = os.pipe()
        os.close(reading)
    else:
        writing = os.open("/dev/full", os.O_WRONLY)
    with os.fdopen(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        if raised:
            with pytest.raises(raised):
                say("x")
        else:
            say("x")
        say("again, to nowhere")


def test_arguments_that_are_no_text_are_told_at_once(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", "--out", os.fsdecode(b"p\xe9")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "sfc: the argument 'p\\xe9' is not UTF-8 text: give files and folders names that are\n"
    )
