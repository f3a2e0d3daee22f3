"""The words of the agreement grammar: nouns, verbs, names and function words with the features the grammar needs.

Nouns are grouped by topic, because a document keeps to a topic; verbs by what may be their subject and object.
Inflected forms are built by rule, irregular ones are written out (`base:past:participle:ing`); a star marks a stative
verb, which has no -ing form.
"""

from __future__ import annotations

from dataclasses import dataclass

SINGULAR, PLURAL = 0, 1
PERSON, ANIMAL, THING, PLACE = "person", "animal", "thing", "place"

# topic: (people, animals, things, places); a person's gender follows a slash, an irregular plural a colon.
TOPICS: dict[str, tuple[str, str, str, str]] = {
    "school": (
        "teacher student pupil friend child:children",
        "mouse:mice rabbit",
        "book bag pencil clock",
        "school library",
    ),
    "hospital": ("doctor nurse patient dentist", "cat", "bed lamp bottle curtain", "hospital station"),
    "farm": ("farmer neighbor shepherd hunter", "cow horse goat pig duck", "truck tree fence apple", "field hill"),
    "theater": (
        "singer dancer actor/m actress/f artist author",
        "bird",
        "violin guitar mask picture",
        "theater museum",
    ),
    "city": ("lawyer senator minister secretary manager officer clerk", "dog", "car key letter phone", "office bridge"),
    "sea": ("sailor captain pilot soldier athlete", "seal", "boat ship map flag", "harbor island"),
    "kitchen": ("chef baker waiter customer guest", "fox", "cake cup table plate", "market shop"),
    "family": (
        "king/m queen/f prince/m princess/f man:men/m woman:women/f boy/m girl/f father/m mother/f uncle/m aunt/f "
        "brother/m sister/f parent",
        "wolf:wolves",
        "crown statue window door",
        "castle garden",
    ),
}

SOCIAL = (
    "like* love* hate* trust* know*:knew:known need* remember* admire* respect* miss* see*:saw:seen hear*:heard envy* "
    "help watch follow call thank visit avoid invite praise blame ignore greet hug:hugged:hugged:hugging meet:met"
)
HANDLE = (
    "carry buy:bought sell:sold paint repair drop:dropped:dropped:dropping wash bring:brought lose:lost "
    "steal:stole:stolen push"
)
HUNT = "chase bite:bit:bitten smell* scare"
PERSON_ACTS = (
    "walk talk smile laugh sing:sang:sung dance work cry travel shout argue complain arrive listen whisper pray "
    "run:ran:run:running sleep:slept wait swim:swam:swum:swimming rest"
)
ANIMAL_ACTS = (
    "run:ran:run:running sleep:slept wait swim:swam:swum:swimming rest jump play eat:ate:eaten hide:hid:hidden"
)
THING_ACTS = "shine:shone fall:fell:fallen burn shake:shook:shaken disappear"
CLAUSAL = "say*:said think*:thought believe* hope* claim*"

# What is done more in a document of a topic.
TOPIC_VERBS = {
    "school": "listen talk whisper help know meet",
    "hospital": "rest sleep cry visit thank trust",
    "farm": "work carry push eat wait follow",
    "theater": "sing dance laugh paint praise admire",
    "city": "travel argue complain call buy blame",
    "sea": "swim shout watch lose miss hear",
    "kitchen": "smile wash sell bring invite greet",
    "family": "love hug walk pray remember hate",
}

PERSON_ADJECTIVES = (
    "happy sad tired angry kind clever brave quiet proud rich poor lazy famous honest lonely friendly busy hungry"
)
ANIMAL_ADJECTIVES = "hungry tired quiet brave wild small big fat old young thirsty"
THING_ADJECTIVES = "new old red green blue heavy small big broken dirty expensive beautiful"
PLACE_ADJECTIVES = "old new small big empty crowded beautiful dark"

MALE_NAMES = "Tom Peter David Henry Carl Oscar Paul Simon Walter Hugo"
FEMALE_NAMES = "Anna Mary Laura Emma Clara Rosa Julia Nora Helen Alice"

MANNER = "quickly slowly quietly happily loudly well together again"
FREQUENCY = "often always never sometimes usually rarely"
LINKS = "because while when but and although"

BE = {"present": ("is", "are"), "past": ("was", "were")}
HAVE = {"present": ("has", "have"), "past": ("had", "had")}
DO = {"present": ("does", "do"), "past": ("did", "did")}


@dataclass(frozen=True)
class Noun:
    """A noun with both its numbers."""

    singular: str
    plural: str
    kind: str
    """person, animal, thing or place"""
    topic: str
    gender: str | None = None
    """m or f where the noun itself tells, else None"""

    def form(self, number: int) -> str:
        return self.plural if number == PLURAL else self.singular


@dataclass(frozen=True)
class Verb:
    """A verb with all its forms."""

    base: str
    """also the plural present"""
    third: str
    """singular present"""
    past: str
    participle: str
    ing: str | None
    """None for a stative verb"""

    def form(self, number: int, tense: str) -> str:
        """The finite form; the past does not agree."""
        if tense == "past":
            return self.past
        return self.base if number == PLURAL else self.third


def add_s(word: str) -> str:
    """The regular plural of a noun, and the regular singular present of a verb."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def parse_noun(text: str, kind: str, topic: str) -> Noun:
    text, _, gender = text.partition("/")
    singular, _, plural = text.partition(":")
    return Noun(singular, plural or add_s(singular), kind, topic, gender or None)


def parse_verb(text: str) -> Verb:
    base, *given = text.replace("*", "").split(":")
    stem = base[:-1] if base.endswith("e") else base
    past = base[:-1] + "ied" if base.endswith("y") and base[-2] not in "aeiou" else stem + "ed"
    forms = given + [past, given[0] if given else past, stem + "ing"][len(given) :]
    return Verb(base, add_s(base), forms[0], forms[1], None if "*" in text else forms[2])


def verbs(text: str) -> tuple[Verb, ...]:
    return tuple(parse_verb(word) for word in text.split())


NOUNS: tuple[Noun, ...] = tuple(
    parse_noun(word, kind, topic)
    for topic, groups in TOPICS.items()
    for kind, group in zip((PERSON, ANIMAL, THING, PLACE), groups, strict=True)
    for word in group.split()
)

# How often each determiner is drawn, by the number of its noun ("a" becomes "an" before a vowel).
DETERMINERS = {
    SINGULAR: {"the": 64, "a": 19, "this": 9, "every": 8},
    PLURAL: {"the": 64, "some": 13, "these": 8, "those": 4, "many": 5, "two": 6},
}
INDEFINITE = {SINGULAR: {"a": 1}, PLURAL: {"some": 3, "many": 1, "two": 1}}
SUBJECT_PRONOUN = {"m": "he", "f": "she", "it": "it", "pl": "they"}
OBJECT_PRONOUN = {"m": "him", "f": "her", "it": "it", "pl": "them"}
POSSESSIVE = {"m": "his", "f": "her", "it": "its", "pl": "their"}
REFLEXIVE = {"m": "himself", "f": "herself", "pl": "themselves"}

# Prepositions after a noun, by what may follow, and of places where something happens, with frequencies.
NOUN_PREPOSITIONS = {
    PERSON: {"near": 3, "behind": 2, "beside": 2, "with": 2},
    ANIMAL: {"near": 3, "behind": 2, "beside": 2, "with": 2},
    THING: {"near": 3, "behind": 2, "beside": 2, "with": 2},
    PLACE: {"near": 3, "behind": 2, "beside": 1, "from": 3, "in": 2},
}
PLACE_PREPOSITIONS = {"in": 5, "near": 2, "behind": 1, "beside": 1}

AUXILIARIES = "is are was were has have had does do did been be will can could not"
LINKERS = "that who by very"
OPENERS = "when there today now tomorrow yesterday"
PUNCTUATION = ", . ?"


def vocabulary() -> list[str]:
    """Every word of the grammar, once, in a fixed order; those that may start a sentence with a capital too."""
    closed = [*AUXILIARIES.split(), *LINKERS.split(), *LINKS.split(), *FREQUENCY.split(), *MANNER.split()]
    pronouns = [word for table in (SUBJECT_PRONOUN, OBJECT_PRONOUN, POSSESSIVE, REFLEXIVE) for word in table.values()]
    determiners = [*DETERMINERS[SINGULAR], "an", *DETERMINERS[PLURAL]]
    prepositions = [word for table in (*NOUN_PREPOSITIONS.values(), PLACE_PREPOSITIONS) for word in table]
    starts = [*determiners, *PLACE_PREPOSITIONS, *SUBJECT_PRONOUN.values(), *OPENERS.split()]
    starts += [word for table in (BE, DO) for pair in table.values() for word in pair]
    adjectives = " ".join((PERSON_ADJECTIVES, ANIMAL_ADJECTIVES, THING_ADJECTIVES, PLACE_ADJECTIVES)).split()
    forms = [
        form
        for group in (SOCIAL, HANDLE, HUNT, PERSON_ACTS, ANIMAL_ACTS, THING_ACTS, CLAUSAL)
        for verb in verbs(group)
        for form in (verb.base, verb.third, verb.past, verb.participle, verb.ing)
        if form is not None
    ]
    nouns = [form for noun in NOUNS for form in (noun.singular, noun.plural)]
    names = [*MALE_NAMES.split(), *FEMALE_NAMES.split()]
    words = [*PUNCTUATION.split(), *determiners, *pronouns, *closed, *prepositions, *adjectives, *names, *nouns, *forms]
    return list(dict.fromkeys([*words, *(word.capitalize() for word in starts)]))
