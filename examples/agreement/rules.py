"""Which rule of the grammar made each word: the behaviours that are known to be in a text.

    for text, rules in labelled_documents(100, seed=0): ...

`RuleGrammar` draws the same documents as `Grammar`, with words that remember their rule. A rule is a place of the
grammar where a word is chosen; where the word has to agree, the number that it agrees with is part of the rule:
`be, plural`, `subject pronoun`, `participle after have`, `relative pronoun`, `full stop`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from examples.agreement import lexicon as lx
from examples.agreement.grammar import ADJECTIVES, Choice, Grammar, Referent, Words
from examples.agreement.lexicon import Verb

FREQUENCY = frozenset(lx.FREQUENCY.split())
PRONOUNS = (
    ("subject pronoun", lx.SUBJECT_PRONOUN), ("object pronoun", lx.OBJECT_PRONOUN),
    ("possessive", lx.POSSESSIVE), ("reflexive", lx.REFLEXIVE),
)  # fmt: skip
NUMBERS = ("singular", "plural")
FIXED = {".": "full stop", ",": "comma", "when": "when", "there": "there", "and": "and"}
"""Rules of words that say by themselves which rule made them, where no other has claimed them."""


class Word(str):
    """A word with the rule that made it."""

    rule: str

    @classmethod
    def of(cls, text: str, rule: str) -> Word:
        """The word, by `rule`."""
        word = cls(text)
        word.rule = rule
        return word


def unclaimed(words: Words) -> list[int]:
    """Indices of the words that have no rule yet."""
    return [index for index, word in enumerate(words) if not isinstance(word, Word)]


def claim(words: Words, *rules: str) -> Words:
    """The words, with those that have no rule made by `rules` in turn, the last of them again and again."""
    named = dict(zip(unclaimed(words), [*rules, *rules[-1:] * len(words)], strict=False))
    return [Word.of(word, named[index]) if index in named else word for index, word in enumerate(words)]


class RuleGrammar(Grammar):
    """The grammar, with words that remember their rule."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.rules: list[str] = []
        """of the words of the document so far"""

    def noun_phrase(self, kind: str, **options: Any) -> tuple[Words, Referent]:
        words, referent = super().noun_phrase(kind, **options)
        rules = ["determiner", *["adjective"] * (len(unclaimed(words)) - 2), f"noun, {NUMBERS[referent.number]}"]
        return claim(words, *rules), referent

    def prepositional_phrase(self) -> Words:
        return claim(super().prepositional_phrase(), "preposition after a noun")

    def place(self) -> Words:
        return claim(super().place(), "preposition of a place")

    def object_clause(self, head: Referent) -> Words:
        return claim(super().object_clause(head), "relative pronoun", "name")

    def subject_clause(self, head: Referent) -> Words:
        return claim(super().subject_clause(head), "relative pronoun")

    def subject(self, kind: str | None = None) -> tuple[Words, Referent]:
        words, referent = super().subject(kind)
        rules = [FIXED.get(words[index], "name") for index in unclaimed(words)]
        return claim(words, *rules) if rules else words, referent

    def pronoun(self, referent: Referent, table: Mapping[str, str]) -> str:
        rule = next(name for name, forms in PRONOUNS if forms is table)
        return Word.of(super().pronoun(referent, table), rule)

    def object(self, kind: str, subject: Referent, role: str) -> Words:
        words = super().object(kind, subject, role)
        return claim(words, "name" if len(words) == 1 else "noun after a possessive")

    def verb_group(self, verb: Verb, subject: Referent, aspect: Choice | str) -> Words:
        words, number = super().verb_group(verb, subject, aspect), NUMBERS[subject.number]
        if words[0] in FREQUENCY:
            return claim(words, "adverb of frequency", f"verb, {number}")
        if len(words) == 1:
            return claim(words, f"verb, {number}")
        if words[0] in ("will", "can", "could"):
            return claim(words, "modal", "verb after a modal")
        if words[0] in lx.HAVE[self.tense]:
            return claim(words, f"have, {number}", "participle after have")
        if words[1] == "not":
            return claim(words, f"do, {number}", "not", "verb after not")
        return claim(words, f"be, {number}", "ing-form after be")

    def be_group(self, subject: Referent, aspect: Choice | str) -> Words:
        words, number = super().be_group(subject, aspect), NUMBERS[subject.number]
        if words[-1] == "been":
            return claim(words, f"have, {number}", "participle after have")
        return (
            claim(words, "modal", "verb after a modal") if words[-1] == "be" else claim(words, f"be, {number}", "not")
        )

    def predicate(self, subject: Referent, **options: Any) -> Words:
        words = super().predicate(subject, **options)
        is_adjective = any(words[index] in ADJECTIVES[subject.kind] for index in unclaimed(words))
        very = ["very"] if "very" in words else []
        return claim(words, *very, "adjective after be") if is_adjective else claim(words, "passive participle", "by")

    def complement(self, frame: str, subject: Referent, role: str) -> Words:
        words = super().complement(frame, subject, role)
        return claim(words, "that of a clause" if frame == "clause" else "adverb of manner")

    def question(self, words: Words, subject: Referent) -> Words:
        asked = super().question(words, subject)
        number = NUMBERS[subject.number]
        if asked[0] in lx.BE[self.tense]:
            return claim(asked, f"be of a question, {number}", "adjective after be", "question mark")
        return claim(asked, f"do of a question, {number}", "verb of a question", "question mark")

    def sentence(self, before: Referent | None) -> tuple[Words, Referent]:
        words, subject = super().sentence(before)
        by_word = {**FIXED, **dict.fromkeys(lx.BE[self.tense], f"be, {NUMBERS[subject.number]}")}
        claimed = [
            word if isinstance(word, Word) else Word.of(word, by_word.get(word) or "time or link") for word in words
        ]
        self.rules += [word.rule for word in claimed]
        return list(claimed), subject


def labelled_documents(count: int, *, seed: int) -> Iterator[tuple[str, list[str]]]:
    """The documents of `documents(count, seed=seed)`, each with the rule that made every one of its words.

    Punctuation marks are words. A document has as many rules as the tokenizer makes tokens of it, `<bos>` aside.
    """
    grammar = RuleGrammar(seed)
    for _ in range(count):
        grammar.rules = []
        text = grammar.document()
        yield text, grammar.rules
