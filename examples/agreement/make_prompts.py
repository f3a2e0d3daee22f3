"""Writes the four prompt sets: `python -m examples.agreement.make_prompts`.

The sets are those of Marks et al. 2024 (arXiv 2403.19647), in its JSON-lines format, with words of this grammar:

    simple     The parents                        run | runs
    nounpp     The secretaries near the car       have | has
    rc         The athlete that the managers like does | do
    within_rc  The athlete that the managers      like | likes

1. Nouns and verbs (answers, the verbs inside relative clauses and the auxiliaries) are divided once: those of the test
   split occur in no train prompt.
2. An item is one choice of words; it gives a pair with a plural and a pair with a singular clean subject. The other
   noun of the sentence is singular and plural in turn, so that half of the pairs have it in conflict with the clean
   subject.
3. Clean and patch prompt differ in the number of the subject alone. "template" names the pattern: all prompts with
   equal templates align position by position, and its fields are the prompts' token spans. "case" is the clean
   subject's number, then the other noun's.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.agreement import FOLDER, PROMPT_SETS, SPLITS
from examples.agreement.grammar import VERBS
from examples.agreement.lexicon import ANIMAL, NOUNS, PERSON, PLURAL, SINGULAR, THING, Noun, Verb

log = logging.getLogger(__name__)
SPLIT_SEED = 5
NUMBER_NAMES = {SINGULAR: "singular", PLURAL: "plural"}
PREPOSITIONS = ("near", "behind", "beside", "with")
# (singular, plural) forms of auxiliaries
AUXILIARIES = {"train": (("is", "are"), ("does", "do")), "test": (("has", "have"), ("was", "were"))}
TEMPLATES = {
    "simple": "The {subject}",
    "nounpp": "The {subject} {preposition} the {attractor}",
    "rc": "The {subject} that the {attractor} {verb}",
    "within_rc": "The {attractor} that the {subject}",
}


@dataclass(frozen=True)
class PromptConfig:
    """How many prompts to write, and where."""

    out: Path = FOLDER / "prompts"
    """folder of the sets"""
    train: int = 600
    """pairs a set, a multiple of 4"""
    test: int = 200
    """pairs a set, a multiple of 4"""
    seed: int = 0
    """of the choice of words; the division of words into train and test is fixed"""


@dataclass(frozen=True)
class SplitWords:
    """The words one split may use."""

    people: Sequence[Noun]
    """subjects, and the nouns of relative clauses"""
    others: Sequence[Noun]
    """nouns of prepositional phrases"""
    social: Sequence[Verb]
    """verbs between people: in relative clauses, and answers"""
    verbs: Sequence[Verb]
    """all that people do: answers"""
    auxiliaries: Sequence[tuple[str, str]]
    """answers, singular and plural"""


def split_words(split: str) -> SplitWords:
    """Two thirds of the nouns and verbs of every class for train, one third for test."""
    rng = random.Random(SPLIT_SEED)

    def part(words: Sequence) -> list:
        shuffled = rng.sample(list(words), len(words))
        third = len(shuffled) // 3
        return shuffled[third:] if split == "train" else shuffled[:third]

    nouns = {kind: part([noun for noun in NOUNS if noun.kind == kind]) for kind in (PERSON, ANIMAL, THING)}
    groups = {name: part(VERBS[name]) for name in ("SOCIAL", "HANDLE", "PERSON_ACTS", "CLAUSAL")}
    return SplitWords(
        people=nouns[PERSON],
        others=[noun for group in nouns.values() for noun in group],
        social=groups["SOCIAL"],
        verbs=[verb for group in groups.values() for verb in group],
        auxiliaries=AUXILIARIES[split],
    )


def items(name: str, split: str, rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """Yield pairs of a set without end; the pairs of one item follow one another."""
    words = split_words(split)
    while True:
        subject, other = rng.choice(words.people), rng.choice(words.others if name == "nounpp" else words.people)
        preposition, inner = rng.choice(PREPOSITIONS), rng.choice(words.social)
        answers = rng.choice(words.auxiliaries)
        if rng.random() < 0.75:
            verb = rng.choice(words.social if name == "within_rc" else words.verbs)
            answers = (verb.third, verb.base)
        if subject == other:
            continue
        pairs = []
        for other_number in (SINGULAR,) if name == "simple" else (SINGULAR, PLURAL):
            prefixes = [
                TEMPLATES[name].format(
                    subject=subject.form(number),
                    attractor=other.form(other_number),
                    preposition=preposition,
                    verb=inner.form(other_number, "present"),
                )
                for number in (SINGULAR, PLURAL)
            ]
            for clean, patch in ((PLURAL, SINGULAR), (SINGULAR, PLURAL)):
                case = NUMBER_NAMES[clean] + ("" if name == "simple" else "_" + NUMBER_NAMES[other_number])
                pairs.append(
                    {
                        "clean_prefix": prefixes[clean],
                        "patch_prefix": prefixes[patch],
                        "clean_answer": " " + answers[clean],
                        "patch_answer": " " + answers[patch],
                        "case": case,
                        "template": TEMPLATES[name],
                    }
                )
        yield pairs


def make_set(name: str, split: str, count: int, *, seed: int) -> list[dict[str, str]]:
    """Return `count` distinct pairs."""
    rng = random.Random(f"{seed} {name} {split}")
    made: dict[str, dict[str, str]] = {}
    for pairs in items(name, split, rng):
        if len(made) >= count:
            break
        made.update({json.dumps(pair): pair for pair in pairs})
    return list(made.values())[:count]


def main(config: PromptConfig) -> None:
    for name in PROMPT_SETS:
        for split in SPLITS:
            pairs = make_set(name, split, getattr(config, split), seed=config.seed)
            path = config.out / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
            log.info("%s: %d pairs", path, len(pairs))


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(tyro.cli(PromptConfig, description=__doc__))
