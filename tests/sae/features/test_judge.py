"""Names by a program and their scores: a judge who knows the truth, one who says yes to all, and wrong answers."""

from __future__ import annotations

import shlex
import sys

import pytest

from sae.errors import UserError
from sae.features.judge import explain, score_labels

ON = [
    {"tokens": ["the ", animal, " sat ", "down"], "activations": [0.0, 3.0, 0.0, 0.0]} for animal in ("cat", "dog") * 3
]
OFF = [{"tokens": ["the ", "car ", "went ", "down"], "activations": [0.0] * 4}] * 4
PAGES = [
    ("mlp_0/1", {"samples": [{"contexts": ON[:3]}, {"contexts": ON[3:]}], "random": [*OFF, ON[0]]}),
    ("mlp_0/2", {"samples": [{"contexts": ON[:1]}], "random": OFF}),  # too few texts
    ("mlp_0/3", {"samples": [{"contexts": ON}], "random": OFF}),  # without a name
]
LABELS = {"mlp_0/1": "animals", "mlp_0/2": "animals"}


def program(answer: str) -> str:
    """A command that prints the value of `answer` for each question `q`."""
    code = f"import sys, json\nfor line in sys.stdin:\n    q = json.loads(line)\n    print(json.dumps({answer}))"
    return shlex.join([sys.executable, "-c", code])


def test_balanced_accuracy_of_a_judge():
    words = "(['<<cat>>', '<<dog>>'] if q['task'] == 'fuzzing' else ['cat', 'dog'])"
    knows = f"[any(word in text for word in {words}) for text in q['texts']]"
    score = score_labels(LABELS, PAGES, program(knows))
    assert set(score) == {"mlp_0/1"} and score["mlp_0/1"].detection == score["mlp_0/1"].fuzzing == 1
    score = score_labels(LABELS, PAGES, program("[1] * len(q['texts'])"))["mlp_0/1"]
    assert (score.detection, score.fuzzing, score.mean) == (0.5, 0.5, 0.5)
    detects = score_labels(
        LABELS, PAGES, program(f"{knows} if q['task'] == 'detection' else [False] * len(q['texts'])")
    )
    assert detects["mlp_0/1"].mean == 0.75


def test_wrong_answers_are_told():
    for answer, message in (("[True]", r"expected a list of \d+ true or false"), ("'yes'", "expected a list")):
        with pytest.raises(UserError, match=message):
            score_labels(LABELS, PAGES, program(answer))
    with pytest.raises(UserError, match="answered 0 lines: expected 2"):
        score_labels(LABELS, PAGES, shlex.join([sys.executable, "-c", "pass"]))
    assert score_labels({}, PAGES, "/no/such/program") == {}
    with pytest.raises(UserError, match="cannot run the program"):
        explain([{"site": "mlp_0"}], "/no/such/program")
