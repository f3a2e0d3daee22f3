"""Nothing that a file holds reaches the terminal as an escape sequence."""

from __future__ import annotations

import json
import logging

from circuits.cli.streams import Printable, printable


def test_control_characters_are_shown():
    assert printable("a\x1b[31mb\x07\x9b\r\x00\u202ec\n\td é") == "a\\x1b[31mb\\x07\\x9b\\x0d\\x00\\u202ec\n\td é"
    record = logging.makeLogRecord({"msg": "x\x1b]0;y\x07", "levelname": "WARNING"})
    assert Printable("%(message)s").format(record) == "x\\x1b]0;y\\x07"


def test_names_and_cases_are_shown_as_they_are(sfc, run_folder, prompts_file, tmp_path):
    rows = [json.loads(line) | {"case": f"\x1b[2J{number % 2}"} for number, line in enumerate(prompts_file.open())]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--top", 2, "--random", 0, "--prompts", tmp_path / "p.jsonl", "--name", "cases"]
    edited = sfc("ablate", "--circuit", run_folder, *words)
    missing = sfc("render", "--circuit", tmp_path / "\x1b[31mred")
    assert edited.status == 0 and missing.status == 2
    for said in (edited.out, missing.err):
        assert "\x1b" not in said and "x1b[" in said


def test_a_name_that_is_too_long(sfc):
    result = sfc("render", "--circuit", "a" * 300)
    assert result.status == 2 and "too long" in result.err
