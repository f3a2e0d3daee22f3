"""A probabilistic grammar of simple English whose verbs agree with their subjects across what stands between.

1. A document draws a topic, which makes some nouns and verbs likelier, and a tense, and keeps both. Its one to four
   sentences are about somebody, whom later sentences may call by a pronoun of the right gender and number.
2. A noun phrase is a determiner that fits the number of its noun, adjectives, the noun, and sometimes a prepositional
   phrase or a subject or object relative clause, whose own nouns may have another number.
3. A predicate is a verb with its auxiliaries (is, has, does, will) and complements; verbs and adjectives fit their
   subject.

Every random choice adds its surprisal to `Grammar.surprisal`. The mean over documents is therefore the entropy of the
derivations, which exceeds the entropy of the text by the choices that the words do not show.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

from examples.agreement import lexicon as lx
from examples.agreement.lexicon import ANIMAL, NOUNS, PERSON, PLACE, PLURAL, SINGULAR, THING, Noun, Verb

Words = list[str]

VERBS = {
    name: lx.verbs(getattr(lx, name))
    for name in ("SOCIAL", "HANDLE", "HUNT", "PERSON_ACTS", "ANIMAL_ACTS", "THING_ACTS", "CLAUSAL")
}
ADJECTIVES = {
    PERSON: lx.PERSON_ADJECTIVES.split(),
    ANIMAL: lx.ANIMAL_ADJECTIVES.split(),
    THING: lx.THING_ADJECTIVES.split(),
    PLACE: lx.PLACE_ADJECTIVES.split(),
}
NAMES = tuple((name, "m") for name in lx.MALE_NAMES.split()) + tuple((name, "f") for name in lx.FEMALE_NAMES.split())


class Choice:
    """Options and their probabilities."""

    def __init__(self, weights: Mapping[Any, float]) -> None:
        total = sum(weights.values())
        self.options = list(weights)
        self.cumulative = list(accumulate(weight / total for weight in weights.values()))
        self.nats = [-math.log(weight / total) for weight in weights.values()]


def even(options: Sequence[Any]) -> Choice:
    return Choice(dict.fromkeys(options, 1))


@cache
def nouns_of(kind: str, topic: str) -> Choice:
    """The nouns of a kind, those of the topic eight times as likely."""
    return Choice({noun: 8 if noun.topic == topic else 1 for noun in NOUNS if noun.kind == kind})


@cache
def verbs_of(group: str, topic: str) -> Choice:
    """The verbs of a group, those of the topic four times as likely."""
    here = lx.TOPIC_VERBS[topic].split()
    return Choice({verb: 4 if verb.base in here else 1 for verb in VERBS[group]})


TOPIC = even(list(lx.TOPICS))
TENSE = Choice({"present": 70, "past": 30})
SENTENCES = Choice({1: 10, 2: 30, 3: 35, 4: 25})
NUMBER = Choice({SINGULAR: 50, PLURAL: 50})
DETERMINER = {number: Choice(weights) for number, weights in lx.DETERMINERS.items()}
INDEFINITE = {number: Choice(weights) for number, weights in lx.INDEFINITE.items()}
ONE_PLACE = Choice({SINGULAR: 80, PLURAL: 20})
WHERE = Choice(lx.PLACE_PREPOSITIONS)
PREPOSITION = {kind: Choice(weights) for kind, weights in lx.NOUN_PREPOSITIONS.items()}
ADJECTIVE = {kind: even(words) for kind, words in ADJECTIVES.items()}
NAME = even(NAMES)
MANNER, FREQUENCY, LINK = (even(text.split()) for text in (lx.MANNER, lx.FREQUENCY, lx.LINKS))
GENDER = even(["m", "f"])

SENTENCE = Choice(
    {"plain": 50, "linked": 14, "two_verbs": 10, "timed": 8, "when": 5, "placed": 5, "existential": 5, "question": 6}
)
SUBJECT = Choice({PERSON: 72, ANIMAL: 15, THING: 13})
NEARBY = Choice({PERSON: 38, ANIMAL: 12, THING: 34, PLACE: 16})
# What follows a head noun: in a subject, and in an object.
MODIFIER = {
    "subject": Choice({"none": 46, "pp": 24, "object_clause": 20, "subject_clause": 10}),
    "object": Choice({"none": 80, "pp": 10, "object_clause": 6, "subject_clause": 4}),
    "none": Choice({"none": 1}),
}
FRAME = {
    PERSON: Choice({"act": 32, "social": 24, "handle": 12, "adjective": 16, "passive": 6, "clause": 10}),
    ANIMAL: Choice({"act": 50, "hunt": 26, "adjective": 24}),
    THING: Choice({"act": 40, "adjective": 60}),
}
# The same without embedded clauses, where the subject is a relative pronoun or the sentence is long already.
SHORT_FRAME = {
    PERSON: Choice({"act": 36, "social": 28, "handle": 14, "adjective": 18, "passive": 4}),
    ANIMAL: FRAME[ANIMAL],
    THING: FRAME[THING],
}
ASPECT = Choice({"simple": 62, "progressive": 12, "perfect": 11, "negated": 8, "modal": 7})
CLAUSE_ASPECT = Choice({"simple": 76, "progressive": 8, "perfect": 10, "negated": 6})
MODAL = {"present": even(["will", "can"]), "past": even(["could"])}
TIME = {
    "present": Choice({"today": 2, "now": 2, "tomorrow": 2}),
    "past": Choice({"yesterday": 1}),
}


@dataclass
class Referent:
    """The person or thing that a noun phrase refers to."""

    number: int
    kind: str
    gender: str | None = None
    """m or f; None until a pronoun has to decide"""


class Grammar:
    """A seeded source of documents."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.surprisal = 0.0
        """nats of all choices so far"""
        self.topic = ""
        self.tense = "present"
        self.seen: Referent | None = None
        """the object of the sentence before, for object pronouns"""
        self.last_object: Referent | None = None
        """the object of this sentence"""

    # choices

    def pick(self, choice: Choice) -> Any:
        index = min(bisect(choice.cumulative, self.random.random()), len(choice.options) - 1)
        self.surprisal += choice.nats[index]
        return choice.options[index]

    def chance(self, probability: float) -> bool:
        hit = self.random.random() < probability
        self.surprisal -= math.log(probability if hit else 1 - probability)
        return hit

    # noun phrases

    def noun_phrase(
        self,
        kind: str,
        *,
        role: str = "none",
        number: int | None = None,
        determiners: Mapping[int, Choice] = DETERMINER,
    ) -> tuple[Words, Referent]:
        """Determiner, adjective, noun and, by role ("subject", "object", "none"), a modifier."""
        number = self.pick(NUMBER) if number is None else number
        determiner = self.pick(determiners[number])
        words = [self.pick(ADJECTIVE[kind])] if self.chance(0.14) else []
        noun: Noun = self.pick(nouns_of(kind, self.topic))
        words.append(noun.form(number))
        if determiner == "a" and words[0][0] in "aeiou":
            determiner = "an"
        referent = Referent(number, kind, noun.gender)
        return [determiner, *words, *self.modifier(referent, role)], referent

    def modifier(self, head: Referent, role: str) -> Words:
        shape = self.pick(MODIFIER[role])
        if shape == "pp":
            return self.prepositional_phrase()
        if shape == "object_clause":
            return self.object_clause(head)
        return self.subject_clause(head) if shape == "subject_clause" else []

    def prepositional_phrase(self) -> Words:
        """A phrase that says which one is meant: near the cars."""
        kind = self.pick(NEARBY)
        words = [self.pick(PREPOSITION[kind]), *self.noun_phrase(kind)[0]]
        return words + self.place() if kind != PLACE and self.chance(0.08) else words

    def place(self) -> Words:
        """A phrase that says where something happens: in the garden."""
        return [self.pick(WHERE), *self.noun_phrase(PLACE, number=self.pick(ONE_PLACE))[0]]

    def object_clause(self, head: Referent) -> Words:
        """A relative clause whose object is the head: that the managers like. Its verb agrees with its own subject."""
        if self.chance(0.14):
            name, gender = self.pick(NAME)
            words, inner = [name], Referent(SINGULAR, PERSON, gender)
        else:
            words, inner = self.noun_phrase(PERSON)
        relative = "who" if head.kind == PERSON and self.chance(0.15) else "that"
        verb = self.verb("handle" if head.kind == THING else "social", inner)
        return [relative, *words, *self.verb_group(verb, inner, CLAUSE_ASPECT)]

    def subject_clause(self, head: Referent) -> Words:
        """A relative clause whose subject is the head, with which its verb agrees: who likes the managers."""
        relative = "who" if head.kind == PERSON and self.chance(0.5) else "that"
        return [relative, *self.predicate(head, short=True, aspect=CLAUSE_ASPECT, role="none")]

    def subject(self, kind: str | None = None) -> tuple[Words, Referent]:
        kind = kind or self.pick(SUBJECT)
        if kind == PERSON and self.chance(0.15):
            name, gender = self.pick(NAME)
            return [name], Referent(SINGULAR, PERSON, gender)
        if kind == PERSON and self.chance(0.06):
            pair = [self.pick(NAME)[0]] if self.chance(0.5) else self.noun_phrase(PERSON)[0]
            return [*pair, "and", *self.noun_phrase(PERSON)[0]], Referent(PLURAL, PERSON)
        return self.noun_phrase(kind, role="subject")

    def pronoun(self, referent: Referent, table: Mapping[str, str]) -> str:
        if referent.number == PLURAL:
            return table["pl"]
        if referent.kind != PERSON:
            return table["it"]
        referent.gender = referent.gender or self.pick(GENDER)
        return table[referent.gender]

    def object(self, kind: str, subject: Referent, role: str) -> Words:
        """A pronoun for the object of the sentence before, a reflexive, a possessive and a noun, a name or a phrase."""
        if self.seen is not None and self.seen.kind == kind and self.chance(0.3):
            return [self.pronoun(self.seen, lx.OBJECT_PRONOUN)]
        if kind == PERSON and subject.kind == PERSON and self.chance(0.05):
            return [self.pronoun(subject, lx.REFLEXIVE)]
        if self.chance(0.15):
            noun = self.pick(nouns_of(kind, self.topic))
            return [self.pronoun(subject, lx.POSSESSIVE), noun.form(self.pick(NUMBER))]
        if kind == PERSON and self.chance(0.12):
            name, gender = self.pick(NAME)
            self.last_object = Referent(SINGULAR, PERSON, gender)
            return [name]
        words, self.last_object = self.noun_phrase(kind, role=role)
        return words

    # predicates

    def verb_group(self, verb: Verb, subject: Referent, aspect: Choice | str) -> Words:
        """The verb with its auxiliaries: likes, is liking, has liked, does not like, will like."""
        shape = aspect if isinstance(aspect, str) else self.pick(aspect)
        number, tense = subject.number, self.tense
        often = [self.pick(FREQUENCY)] if shape == "simple" and self.chance(0.06) else []
        if shape == "progressive" and verb.ing is not None:
            return [lx.BE[tense][number], verb.ing]
        if shape == "perfect":
            return [lx.HAVE[tense][number], verb.participle]
        if shape == "negated":
            return [lx.DO[tense][number], "not", verb.base]
        if shape in ("modal", "will"):
            return ["will" if shape == "will" else self.pick(MODAL[tense]), verb.base]
        return [*often, verb.form(number, tense)]

    def be_group(self, subject: Referent, aspect: Choice | str) -> Words:
        """The verb "be" with its auxiliaries, before an adjective or a participle."""
        shape = aspect if isinstance(aspect, str) else self.pick(aspect)
        number, tense = subject.number, self.tense
        if shape == "perfect":
            return [lx.HAVE[tense][number], "been"]
        if shape in ("modal", "will"):
            return ["will" if shape == "will" else self.pick(MODAL[tense]), "be"]
        return [lx.BE[tense][number], *(["not"] if shape == "negated" else [])]

    def predicate(
        self, subject: Referent, *, short: bool = False, aspect: Choice | str = ASPECT, role: str = "object"
    ) -> Words:
        frame = self.pick((SHORT_FRAME if short else FRAME)[subject.kind])
        if frame == "adjective":
            very = ["very"] if self.chance(0.2) else []
            return [*self.be_group(subject, aspect), *very, self.pick(ADJECTIVE[subject.kind])]
        if frame == "passive":
            agent = ["by", *self.noun_phrase(PERSON)[0]] if self.chance(0.7) else []
            return [*self.be_group(subject, aspect), self.verb(frame, subject).participle, *agent]
        verb = self.verb(frame, subject)
        head = self.verb_group(verb, subject, aspect)
        return head + self.complement(frame, subject, role)

    def verb(self, frame: str, subject: Referent) -> Verb:
        group = {"act": f"{subject.kind}_acts", "clause": "clausal", "passive": "social"}.get(frame, frame)
        return self.pick(verbs_of(group.upper(), self.topic))

    def complement(self, frame: str, subject: Referent, role: str) -> Words:
        if frame == "clause":
            return ["that", *self.clause(subject, short=True)]
        words: Words = []
        if frame != "act":
            kinds = {"social": PERSON, "handle": THING, "hunt": ANIMAL}
            kind = PERSON if frame == "hunt" and self.chance(0.3) else kinds[frame]
            words = self.object(kind, subject, role)
        if role == "none":
            return words
        if frame in ("act", "handle") and subject.kind != THING and self.chance(0.2):
            return [*words, self.pick(MANNER)]
        return words + self.place() if self.chance(0.16) else words

    def clause(self, before: Referent | None = None, *, short: bool = False) -> Words:
        """A subject, often a pronoun for the one before, and its predicate."""
        if before is not None and self.chance(0.45):
            return [self.pronoun(before, lx.SUBJECT_PRONOUN), *self.predicate(before, short=short)]
        words, subject = self.subject()
        return words + self.predicate(subject, short=short)

    # sentences and documents

    def sentence(self, before: Referent | None) -> tuple[Words, Referent]:
        """One sentence about a new subject, or about the one before, which a pronoun then names."""
        shape = self.pick(SENTENCE)
        if shape == "existential":
            words, subject = self.noun_phrase(self.pick(SUBJECT), determiners=INDEFINITE)
            return ["there", lx.BE[self.tense][subject.number], *words, *self.prepositional_phrase(), "."], subject
        if before is not None and self.chance(0.5):
            words, subject = [self.pronoun(before, lx.SUBJECT_PRONOUN)], before
        else:
            words, subject = self.subject()
        if shape == "question":
            return self.question(words, subject), subject
        if shape == "timed":
            time = self.pick(TIME[self.tense])
            aspect: Choice | str = "will" if time == "tomorrow" else ASPECT
            return [time, ",", *words, *self.predicate(subject, aspect=aspect), "."], subject
        if shape == "when":
            first = self.predicate(subject, short=True, role="none")
            return ["when", *words, *first, ",", *self.clause(subject, short=True), "."], subject
        if shape == "placed":
            return [*self.place(), ",", *words, *self.predicate(subject), "."], subject
        words = words + self.predicate(subject, short=shape != "plain")
        if shape == "linked":
            words += [self.pick(LINK), *self.clause(subject, short=True)]
        elif shape == "two_verbs":
            words += ["and", *self.predicate(subject, short=True)]
        return [*words, "."], subject

    def question(self, words: Words, subject: Referent) -> Words:
        if self.chance(0.35):
            be = lx.BE[self.tense][subject.number]
            return [be, *words, self.pick(ADJECTIVE[subject.kind]), "?"]
        frame = self.pick(SHORT_FRAME[subject.kind])
        frame = "act" if frame in ("adjective", "passive") else frame
        verb = self.verb(frame, subject)
        do = lx.DO[self.tense][subject.number]
        return [do, *words, verb.base, *self.complement(frame, subject, "none"), "?"]

    def document(self) -> str:
        self.topic, self.tense = self.pick(TOPIC), self.pick(TENSE)
        self.seen = None
        before: Referent | None = None
        sentences = []
        for _ in range(self.pick(SENTENCES)):
            self.last_object = None
            words, before = self.sentence(before)
            self.seen = self.last_object
            sentences.append(spell(words))
        return " ".join(sentences)


def spell(words: Words) -> str:
    """The sentence as text: a capital first, no space before punctuation."""
    text = "".join(word if word in ",.?" else " " + word for word in words)[1:]
    return text[0].upper() + text[1:]


def documents(count: int, *, seed: int) -> Iterator[str]:
    """`count` documents, the same for the same seed."""
    grammar = Grammar(seed)
    for _ in range(count):
        yield grammar.document()


def entropy(count: int, *, seed: int) -> float:
    """Nats of a document's derivation, mean over a sample."""
    grammar = Grammar(seed)
    for _ in range(count):
        grammar.document()
    return grammar.surprisal / count
