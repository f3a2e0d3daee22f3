"""The grammar's sentences against a parser that knows the words' numbers and shares no code with the generator."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

import pytest

from examples.agreement import lexicon as lx
from examples.agreement import text as text_file
from examples.agreement.grammar import Grammar, documents, entropy
from examples.agreement.lexicon import NOUNS, PERSON, vocabulary
from examples.agreement.make_text import TextConfig, make_text

SG, PL = "singular", "plural"
NOUN = {n.singular: (SG, n) for n in NOUNS} | {n.plural: (PL, n) for n in NOUNS}
GROUPS = (lx.SOCIAL, lx.HANDLE, lx.HUNT, lx.PERSON_ACTS, lx.ANIMAL_ACTS, lx.THING_ACTS, lx.CLAUSAL)
VERBS = [verb for group in GROUPS for verb in lx.verbs(group)]
CLAUSAL = {form for v in lx.verbs(lx.CLAUSAL) for form in (v.base, v.third, v.past, v.participle)}
BASE, THIRD, PAST = ({getattr(v, name) for v in VERBS} for name in ("base", "third", "past"))
VERB_FORMS = {v.participle for v in VERBS} | {v.ing for v in VERBS} | BASE
ADJECTIVES = {
    word
    for text in (lx.PERSON_ADJECTIVES, lx.ANIMAL_ADJECTIVES, lx.THING_ADJECTIVES, lx.PLACE_ADJECTIVES)
    for word in text.split()
}
NAMES = dict.fromkeys(lx.MALE_NAMES.split(), "m") | dict.fromkeys(lx.FEMALE_NAMES.split(), "f")
NUMBER_OF_DETERMINER = {"a": SG, "an": SG, "this": SG, "every": SG, "the": None, "his": None, "her": None, "its": None}
NUMBER_OF_DETERMINER |= {"their": None, "some": PL, "these": PL, "those": PL, "many": PL, "two": PL}
PRONOUNS = {"he": (SG, "m"), "she": (SG, "f"), "it": (SG, "it"), "they": (PL, None)}
OBJECT_ONLY = {"him", "them", *lx.REFLEXIVE.values()}
AUXILIARIES = {"is": SG, "was": SG, "are": PL, "were": PL, "has": SG, "have": PL, "does": SG, "do": PL}
AUXILIARIES |= {"had": None, "did": None, "will": None, "can": None, "could": None}
BE = {"is", "are", "was", "were", "be", "been"}
PREPOSITIONS = {"near", "behind", "beside", "with", "from", "in"}
MANNER, FREQUENCY, LINKS = (set(text.split()) for text in (lx.MANNER, lx.FREQUENCY, lx.LINKS))


class Disagreement(AssertionError):
    pass


@dataclass
class Subject:
    number: str
    gender: str | None
    pronoun: bool = False


class Parser:
    """Recursive descent over one sentence; raises where it does not parse or does not agree."""

    def __init__(self, sentence: str) -> None:
        words = re.findall(r"\w+|[.,?]", sentence)
        self.words = [words[0] if words[0] in NAMES else words[0].lower(), *words[1:], "<end>"]
        self.at = 0

    @property
    def word(self) -> str:
        return self.words[self.at]

    def take(self, *allowed: str) -> str:
        word = self.word
        if allowed and word not in allowed:
            raise Disagreement(f"{word!r} for {allowed} in {' '.join(self.words)}")
        self.at += 1
        return word

    def agree(self, one: str | None, other: str | None) -> None:
        if one is not None and other is not None and one != other:
            raise Disagreement(f"{one} with {other} before word {self.at} of {' '.join(self.words)}")

    def starts_noun_phrase(self) -> bool:
        return self.word in NUMBER_OF_DETERMINER or self.word in NAMES or self.word in PRONOUNS

    def noun_phrase(self, modifiers: bool = True) -> Subject:
        word = self.take()
        if word in NAMES:
            return Subject(SG, NAMES[word])
        if word in PRONOUNS:
            return Subject(*PRONOUNS[word], pronoun=True)
        if word not in NUMBER_OF_DETERMINER:
            raise Disagreement(f"no noun phrase at {word!r} in {' '.join(self.words)}")
        if word in ("a", "an"):
            assert (self.word[0] in "aeiou") == (word == "an")
        while self.word in ADJECTIVES:
            self.take()
        if self.word not in NOUN:
            raise Disagreement(f"no noun at {self.word!r} in {' '.join(self.words)}")
        number, noun = NOUN[self.take()]
        self.agree(NUMBER_OF_DETERMINER[word], number)
        gender = noun.gender if noun.kind == PERSON else "it"
        subject = Subject(number, gender if number == SG else None)
        while modifiers and self.word in PREPOSITIONS:
            self.take()
            self.noun_phrase(modifiers=False)
        if modifiers and self.word in ("that", "who"):
            self.take()
            if self.starts_noun_phrase():
                inner = self.noun_phrase(modifiers=False)
                self.verb_group(inner.number)
            else:
                self.predicate(number)
        return subject

    def subject(self) -> Subject:
        first = self.noun_phrase()
        if self.word == "and" and not first.pronoun:
            self.take()
            self.noun_phrase()
            return Subject(PL, None)
        return first

    def verb_group(self, number: str) -> bool:
        """Whether the verb may be followed by a clause."""
        if self.word in FREQUENCY:
            self.take()
        word = self.take()
        if word in AUXILIARIES:
            self.agree(AUXILIARIES[word], number)
            be = word in BE
            while self.word in ("not", "be", "been", "very"):
                be |= self.take() in BE
            if self.word in VERB_FORMS:
                word = self.take()
            elif not (be and self.take() in ADJECTIVES):
                raise Disagreement(f"nothing after {word!r} in {' '.join(self.words)}")
        elif word in PAST:
            pass
        elif word in THIRD or word in BASE:
            self.agree(SG if word in THIRD else PL, number)
        else:
            raise Disagreement(f"no verb at {word!r} in {' '.join(self.words)}")
        return word in CLAUSAL

    def predicate(self, number: str) -> None:
        self.complement(self.verb_group(number))

    def complement(self, clausal: bool) -> None:
        if clausal:
            self.take("that")
            self.clause()
            return
        if self.word == "by":
            self.take()
        if self.word in OBJECT_ONLY or (self.word in ("it", "her") and self.words[self.at + 1] not in {*NOUN}):
            self.take()
        elif self.starts_noun_phrase():
            self.noun_phrase()
        if self.word in MANNER:
            self.take()
        elif self.word in PREPOSITIONS:
            self.take()
            self.noun_phrase(modifiers=False)

    def clause(self) -> Subject:
        subject = self.subject()
        self.predicate(subject.number)
        return subject

    def sentence(self) -> Subject:
        """The subject of the first clause."""
        if self.word == "there":
            self.take()
            be = self.take("is", "are", "was", "were")
            subject = self.noun_phrase()
            self.agree(AUXILIARIES[be], subject.number)
        elif self.word in AUXILIARIES:
            auxiliary = self.take()
            subject = self.subject()
            self.agree(AUXILIARIES[auxiliary], subject.number)
            if auxiliary in BE:
                self.take(*ADJECTIVES)
            else:
                self.complement(self.take(*BASE) in CLAUSAL)
            self.take("?")
            return self.end(subject)
        else:
            subject = self.statement()
        self.take(".")
        return self.end(subject)

    def statement(self) -> Subject:
        if self.word in ("today", "now", "tomorrow", "yesterday"):
            self.take()
            self.take(",")
        elif self.word in PREPOSITIONS:
            self.take()
            self.noun_phrase(modifiers=False)
            self.take(",")
        elif self.word == "when":
            self.take()
            subject = self.clause()
            self.take(",")
            self.clause()
            return subject
        subject = self.clause()
        if self.word in LINKS:
            link = self.take()
            if link == "and" and not self.starts_noun_phrase():
                self.predicate(subject.number)
            else:
                self.clause()
        return subject

    def end(self, subject: Subject) -> Subject:
        self.take("<end>")
        return subject


def check(document: str) -> int:
    """Parses every sentence, and the pronouns that open a sentence against the subject before; returns their number."""
    before: Subject | None = None
    pronouns = 0
    for sentence in re.findall(r"[^.?]+[.?]", document):
        subject = Parser(sentence.strip()).sentence()
        if subject.pronoun and before is not None:
            pronouns += 1
            if subject.number != before.number or (before.gender and subject.gender not in (None, before.gender)):
                raise Disagreement(f"{subject} after {before}: {document}")
            subject.gender = subject.gender or before.gender
        before = subject
    return pronouns


def test_every_sentence_agrees() -> None:
    assert sum(check(document) for document in text_file("train").read_text().splitlines()[:2000]) > 250


@pytest.mark.parametrize(
    "bad",
    [
        "The parents near the car runs.",
        "The athlete that the managers like do not sleep.",
        "The athlete that the managers likes sleeps.",
        "The teacher who see the boys runs.",
        "Tom and Anna smiles.",
        "These boy runs.",
        "There are a dog near the house.",
        "Does the boys run?",
        "The boy says that the girls is happy.",
        "The boy sings and talk.",
        "The queen sleeps. He runs.",
        "The boys sleep. She runs.",
    ],
)
def test_the_parser_finds_disagreement(bad: str) -> None:
    with pytest.raises(Disagreement):
        check(bad)


def test_structures_are_frequent_enough_to_learn_from() -> None:
    text = " ".join(text_file("train").read_text().splitlines()[:3000])
    words = Counter(re.findall(r"\w+", text))
    assert set(words) <= set(vocabulary())
    relative = len(re.findall(r"\b(?:that|who) (?:the|some|this|every|these|a|two|many|those) ", text))
    assert relative / text.count(".") > 0.15
    assert min(words[word] for word in ("he", "she", "they", "is", "are", "has", "have", "does", "do", "will")) > 100


def test_same_seed_same_documents() -> None:
    assert list(documents(200, seed=3)) == list(documents(200, seed=3))
    assert list(documents(200, seed=3)) != list(documents(200, seed=4))


def test_vocabulary_has_no_word_in_two_open_classes() -> None:
    nouns = {form for noun in NOUNS for form in (noun.singular, noun.plural)}
    forms = {form for verb in VERBS for form in (verb.base, verb.third, verb.past, verb.participle, verb.ing)}
    assert not nouns & forms and not nouns & ADJECTIVES and not forms & ADJECTIVES
    assert all(verb.base != verb.third and verb.base != verb.past for verb in VERBS)
    assert all(noun.singular != noun.plural for noun in NOUNS)
    assert 300 <= len(vocabulary()) == len(set(vocabulary())) <= 800


def test_surprisal_is_that_of_independent_choices() -> None:
    """Coin flips, counted by hand."""
    grammar = Grammar(0)
    before = grammar.surprisal
    hits = sum(grammar.chance(0.25) for _ in range(4000))
    expected = -hits * math.log(0.25) - (4000 - hits) * math.log(0.75)
    assert grammar.surprisal - before == pytest.approx(expected)
    assert entropy(50, seed=1) > 0


def test_bundled_text_is_what_the_script_writes() -> None:
    """Its first lines; the two splits share none."""
    texts = {split: text_file(split).read_text().splitlines() for split in ("train", "valid")}
    for split, lines in make_text(TextConfig(train=600, valid=200)).items():
        assert len(lines) > 190 and texts[split][: len(lines)] == lines
    assert not set(texts["train"]) & set(texts["valid"])
