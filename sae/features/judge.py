"""Names of features by a program, and how well names say where features are on: a language model behind a few lines.

1. `explain`: for each feature the program gets its tokens, contexts and promoted tokens, and answers a name.
2. `score_labels` (Paulo et al. 2024, arXiv 2410.13928): for each name the program gets two tasks, each a list of texts,
   and answers a list of true and false.
   - detection: in which texts is a feature of this name on? Half of them were drawn from those it is on in, over all
     intervals of its activation; in the others it is nowhere on.
   - fuzzing: in which texts are the tokens that it is on at between << and >>? In half of them others are.
   The score of a task is the balanced accuracy, the mean of the shares of true and of false texts that are told as
   such: 1 where all are, 0.5 by chance. Texts are random samples, not the strongest contexts that names are made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from sklearn.metrics import balanced_accuracy_score

from sae._run.programs import ask
from sae.errors import UserError

MOST = 20
"""Texts of a task at most that are to be called true, and as many others."""
FEWEST = 2
"""Of each kind; with fewer there is no score."""


@dataclass(frozen=True)
class LabelScore:
    """How well a program that knows a feature's name tells where it is on: balanced accuracies, None without texts."""

    detection: float | None
    """Of whole texts."""
    fuzzing: float | None
    """Of marked tokens."""

    @property
    def mean(self) -> float | None:
        """Mean of those there are."""
        scores = [score for score in (self.detection, self.fuzzing) if score is not None]
        return sum(scores) / len(scores) if scores else None


def explain(features: Sequence[Mapping[str, Any]], command: str, *, timeout: float = 600.0) -> list[str]:
    """A name for each feature, which is told as a JSON object a line; UserError for another number of lines."""
    names = ask(command, features, timeout=timeout) if features else []
    if len(names) != len(features):
        raise UserError(f"the program {command!r} answered {len(names)} lines: expected a name for {len(features)}")
    return names


def score_labels(
    labels: Mapping[str, str], records: Iterable[tuple[str, Mapping[str, Any]]], command: str, *, seed: int = 0,
    timeout: float = 600.0,
) -> dict[str, LabelScore]:  # fmt: skip
    """Scores of names by the feature's name.

    Args:
        labels: What features are called, `{"resid_3/120": "plural nouns"}`.
        records: Features' pages by name (`samples` and `random` texts), of which there may be more.
        command: The program: `{"feature": ..., "label": ..., "task": "detection", "texts": [...]}` a line, to each of
            which it answers a JSON list of true and false.
        seed: Which texts are drawn, in what order.
        timeout: Seconds the program may take.

    Raises:
        UserError: The program fails, or answers something else.
    """
    asked: list[tuple[str, str, list[tuple[str, bool]]]] = []
    for name, record in records:
        if name in labels:
            asked += [(name, task, texts) for task, texts in _tasks(record, Random(f"{seed} {name}")).items() if texts]
    questions = [
        {"feature": name, "label": labels[name], "task": task, "texts": [text for text, _ in texts]}
        for name, task, texts in asked
    ]
    answers = ask(command, questions, timeout=timeout) if questions else []
    if len(answers) != len(asked):
        raise UserError(f"the program {command!r} answered {len(answers)} lines: expected {len(asked)}")
    scores: dict[str, dict[str, float]] = {}
    for (name, task, texts), answer in zip(asked, answers, strict=True):
        told = _told(answer, len(texts), command)
        scores.setdefault(name, {})[task] = float(balanced_accuracy_score([truth for _, truth in texts], told))
    return {name: LabelScore(of.get("detection"), of.get("fuzzing")) for name, of in scores.items()}


def _tasks(record: Mapping[str, Any], random: Random) -> dict[str, list[tuple[str, bool]]]:
    """The texts of both tasks with what is true of them, in random order; none where there are too few."""
    on = [context for sample in record.get("samples", ()) for context in sample["contexts"]]
    off = [context for context in record.get("random", ()) if max(context["activations"], default=0) <= 0]
    random.shuffle(on)
    n = min(len(on), len(off), MOST)
    detection = [("".join(c["tokens"]), True) for c in on[:n]] + [("".join(c["tokens"]), False) for c in off[:n]]
    markable = [c for c in on if 2 * len(_peaks(c)) <= len(c["tokens"]) and _elsewhere(c, random)]
    n_marked = min(len(markable) // 2, MOST)
    fuzzing = [(_marked(c, _peaks(c)), True) for c in markable[:n_marked]]
    fuzzing += [(_marked(c, _elsewhere(c, random)), False) for c in markable[n_marked : 2 * n_marked]]
    tasks = {"detection": detection if n >= FEWEST else [], "fuzzing": fuzzing if n_marked >= FEWEST else []}
    for texts in tasks.values():
        random.shuffle(texts)
    return tasks


def _peaks(context: Mapping[str, Any]) -> set[int]:
    """The tokens at which a feature is at least half as active as it is at most in the text."""
    activations = context["activations"]
    return {i for i, activation in enumerate(activations) if activation >= max(activations) / 2}


def _elsewhere(context: Mapping[str, Any], random: Random) -> set[int]:
    """As many tokens at which it is not active at all; none where there are fewer."""
    free, n = [i for i, activation in enumerate(context["activations"]) if activation <= 0], len(_peaks(context))
    return set(random.sample(free, n)) if len(free) >= n else set()


def _marked(context: Mapping[str, Any], places: set[int]) -> str:
    return "".join(f"<<{token}>>" if i in places else token for i, token in enumerate(context["tokens"]))


def _told(answer: str, n: int, command: str) -> list[bool]:
    """The list of true and false in a line."""
    try:
        told = json.loads(answer)
    except ValueError:
        told = None
    if not isinstance(told, list) or len(told) != n or any(value not in (True, False) for value in told):
        raise UserError(f"the program {command!r} answered {answer[:60]!r}: expected a list of {n} true or false")
    return [bool(value) for value in told]
