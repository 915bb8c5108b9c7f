"""A toy language: some 230 English words, a small grammar, and who tends to do what to whom.

The embedded model is trained on it. Nothing is downloaded and no text of anybody's is used:
every sequence follows from the word lists below and a seed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

END = "<|endoftext|>"
UNKNOWN = "<unk>"

DETERMINERS = "the a this that every my your our their some".split()
ADJECTIVES = (
    "red blue green black white old young big small tall quiet loud happy sad angry kind wise "
    "clever brave shy fast slow bright dark warm cold soft hard sweet strange lost hungry sleepy "
    "proud gentle wild"
).split()
NOUNS = (
    "cat dog fox bird fish horse cow sheep bear wolf mouse frog bee owl duck king queen farmer "
    "baker sailor doctor teacher child friend thief poet soldier painter house garden river "
    "mountain forest village city bridge road door window table chair lamp book letter song "
    "story picture key box coat hat ring clock boat wagon apple bread cheese egg cake soup tea "
    "flower tree stone star moon cloud rain"
).split()
NAMES = (
    "alice bob carol david emma frank grace henry iris jack kate leo mary nina oscar paul rose "
    "sam tom vera"
).split()
TRANSITIVE = (
    "sees finds takes brings likes loves hates knows hears follows watches holds carries drops "
    "breaks makes buys sells eats draws hides opens closes paints remembers forgets meets calls "
    "helps leaves wants keeps guards steals washes mends"
).split()
INTRANSITIVE = (
    "sleeps sings runs jumps laughs cries waits falls swims dances smiles speaks walks flies "
    "listens hurries dreams works rests grows"
).split()
ADVERBS = (
    "slowly quickly quietly loudly happily sadly often always never again today gladly badly "
    "well alone together"
).split()
PREPOSITIONS = "in on under near behind with from to by over beside across".split()
JOINERS = "and but while because then so".split()
OTHER = ["is", "was", ".", ","]

WORDS: tuple[str, ...] = (
    END,
    UNKNOWN,
    *OTHER,
    *DETERMINERS,
    *ADJECTIVES,
    *NOUNS,
    *NAMES,
    *TRANSITIVE,
    *INTRANSITIVE,
    *ADVERBS,
    *PREPOSITIONS,
    *JOINERS,
)
IDS = {word: index for index, word in enumerate(WORDS)}
FIRST_ORDINARY_ID = 2  # the two before it, END and UNKNOWN, never occur inside a sequence


class ToyLanguage:
    """Sentences of the toy grammar, with habits (which noun does what) that the seed decides."""

    def __init__(self, seed: int) -> None:
        habits = random.Random(seed)
        subjects = NOUNS + NAMES
        self._adjectives = {noun: habits.sample(ADJECTIVES, 3) for noun in NOUNS}
        self._transitive = {subject: habits.sample(TRANSITIVE, 3) for subject in subjects}
        self._intransitive = {subject: habits.sample(INTRANSITIVE, 2) for subject in subjects}
        self._objects = {verb: habits.sample(NOUNS, 4) for verb in TRANSITIVE}
        self._random = random.Random(seed + 1)

    def passage(self, length: int) -> list[int]:
        """`length` token ids of running text, the last sentence cut short."""
        words: list[str] = []
        while len(words) < length:
            words += self._sentence()
        return [IDS[word] for word in words[:length]]

    def _sentence(self) -> list[str]:
        clause = self._clause()
        if self._chance(0.2):
            clause += [",", self._one(JOINERS), *self._clause()]
        return [*clause, "."]

    def _clause(self) -> list[str]:
        subject = self._one(NAMES) if self._chance(0.3) else self._one(NOUNS)
        words = self._noun_phrase(subject)
        kind = self._random.random()
        if kind < 0.55:
            verb = self._one(self._transitive[subject])
            words += [verb, *self._noun_phrase(self._one(self._objects[verb]))]
        elif kind < 0.85:
            words.append(self._one(self._intransitive[subject]))
            if self._chance(0.4):
                words.append(self._one(ADVERBS))
        else:
            words += [self._one(["is", "was"]), self._one(ADJECTIVES)]
        if self._chance(0.25):
            words += [self._one(PREPOSITIONS), *self._noun_phrase(self._one(NOUNS))]
        return words

    def _noun_phrase(self, noun: str) -> list[str]:
        if noun in NAMES:
            return [noun]
        adjective = [self._one(self._adjectives[noun])] if self._chance(0.35) else []
        return [self._one(DETERMINERS), *adjective, noun]

    def _one(self, words: Sequence[str]) -> str:
        return self._random.choice(words)

    def _chance(self, probability: float) -> bool:
        return self._random.random() < probability
