"""Writes texts with an intended and a spurious label: `python -m examples.agreement.make_labelled --out FOLDER`.

A probe of the number of the subject that was trained where it agrees with something else may read that instead.

    attractor  The secretaries near the car         intended: the subject's number, spurious: the attractor's number
    subject    The secretaries near the car often   intended: the subject's number, spurious: a person or a thing

1. `attractor`: the probe reads the last token, the attractor, whose number is in its own embedding.
2. `subject`: the probe reads the adverb, to which attention has to bring everything. Every text has a person and a
   thing, so that no word says which of them is the subject: what is spurious has to be computed.
3. Nouns of the test split occur in no other. The `concept` split has the spurious label alone.

A third set, `kind`, has one label, for `sfc tpp`: whether the subject is a person, an animal or a thing.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.agreement.lexicon import ANIMAL, FREQUENCY, PERSON, PLURAL, SINGULAR, THING, Noun
from examples.agreement.make_prompts import NUMBER_NAMES, PREPOSITIONS, SplitWords, split_words

log = logging.getLogger(__name__)
SETS = ("attractor", "subject")
SPLITS = ("train", "concept", "test")
KINDS = (PERSON, ANIMAL, THING)
TEMPLATE = "The {subject} {preposition} the {attractor}"
GROUPS = tuple((subject, other) for subject in (SINGULAR, PLURAL) for other in (SINGULAR, PLURAL))


@dataclass(frozen=True)
class LabelledConfig:
    """How many texts to write, and where."""

    out: Path
    """folder that receives SET_SPLIT.jsonl"""
    train: int = 800
    """texts a set with both labels, as many of each of the four groups"""
    concept: int = 400
    """texts a set with the spurious label alone"""
    test: int = 400
    """texts a set to test on"""
    seed: int = 0
    """of the choice of words"""


def labelled(name: str, split: str, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """`count` texts of a set ("attractor", "subject") and split ("train", "concept", "test"), each once."""
    if name not in SETS or split not in SPLITS:
        raise ValueError(f"no texts {name!r}, {split!r}: sets are {SETS}, splits {SPLITS}")
    made: dict[str, dict[str, str]] = {}
    for text in _texts(name, split, random.Random(f"{seed} {name} {split}")):
        if len(made) >= count:
            break
        if split == "concept":
            del text["intended"]
        made.setdefault(text["text"], text)
    return list(made.values())


def _texts(name: str, split: str, rng: random.Random) -> Iterator[dict[str, str]]:
    """Texts without end, the four groups in turn."""
    words = split_words("test" if split == "test" else "train")
    things = [noun for noun in words.others if noun.kind == THING]
    while True:
        for number, other_number in GROUPS:
            if name == "attractor":
                yield from _attractor(words, number, other_number, rng)
            else:
                yield _subject(words.people, things, number, other_number, rng)


def _phrase(subject: str, other: str, rng: random.Random) -> str:
    return TEMPLATE.format(subject=subject, preposition=rng.choice(PREPOSITIONS), attractor=other)


def _attractor(words: SplitWords, number: int, other_number: int, rng: random.Random) -> Iterator[dict[str, str]]:
    subject, other = rng.choice(words.people), rng.choice(words.others)
    if subject != other:
        text = _phrase(subject.form(number), other.form(other_number), rng)
        labels = {"intended": NUMBER_NAMES[number], "spurious": NUMBER_NAMES[other_number]}
        yield {"text": text, **labels, "template": TEMPLATE}


def _subject(
    people: Sequence[Noun], things: Sequence[Noun], number: int, is_person: int, rng: random.Random
) -> dict[str, str]:
    person, thing = rng.choice(people), rng.choice(things)
    subject, other = (person, thing) if is_person else (thing, person)
    text = _phrase(subject.form(number), other.form(rng.choice((SINGULAR, PLURAL))), rng)
    labels = {"intended": NUMBER_NAMES[number], "spurious": "person" if is_person else "thing"}
    return {"text": f"{text} {rng.choice(FREQUENCY.split())}", **labels}


def kinds(split: str, count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """`count` sentences with the kind of their subject, split "train" or "test"."""
    rng = random.Random(f"{seed} kind {split}")
    words = split_words("test" if split == "test" else "train")
    nouns = {kind: [noun for noun in (*words.people, *words.others) if noun.kind == kind] for kind in KINDS}
    texts = []
    for number in range(count):
        kind, other_kind = KINDS[number % 3], rng.choice(KINDS)
        subject, other = (rng.choice(nouns[one]).form(rng.choice((SINGULAR, PLURAL))) for one in (kind, other_kind))
        text = f"{_phrase(subject, other, rng)} {rng.choice(FREQUENCY.split())}"
        texts.append({"text": text, "label": kind})
    return texts


def write(config: LabelledConfig) -> None:
    """Write every split of every set."""
    config.out.mkdir(parents=True, exist_ok=True)
    sets = {(name, split): labelled(name, split, getattr(config, split), seed=config.seed)
            for name in SETS for split in SPLITS}  # fmt: skip
    sets |= {("kind", split): kinds(split, getattr(config, split), seed=config.seed) for split in ("train", "test")}
    for (name, split), texts in sets.items():
        path = config.out / f"{name}_{split}.jsonl"
        path.write_text("".join(json.dumps(text) + "\n" for text in texts))
        log.info("%s: %d texts", path, len(texts))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    write(tyro.cli(LabelledConfig, description=__doc__))
