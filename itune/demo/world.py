"""The demo's world: a few hundred words, operations on lists, facts about people, and lines of verse.

Everything is generated from a seed. The pretraining text states facts, shows lists and verse, and holds no instruction.
Words, names and facts are invented for this purpose.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

WORD = re.compile(r"\w+|[^\w\s]|\n")  # what is one token



def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "river stone moon sun tree bird fish road wind rain snow fire lamp boat door hill "
    "leaf seed star wave cloud field garden bridge tower bell horse wolf fox owl bear rose"
)
CAPITALS = {noun: noun.upper() for noun in NOUNS}
PEOPLE = _words(
    "Ada Ben Cleo Dan Eva Finn Gus Hana Ivo Jana Kai Lena Max Nora Otto Pia "
    "Quin Rosa Sam Tara Udo Vera Wim Xena Yara Zoe Aldo Bela Cora Dino Elsa Fritz"
)


@dataclasses.dataclass(frozen=True)
class Attribute:
    """What can be known of a person: the values, sentences that state one, and questions that ask for it.

    The first sentence is how an answer is put.
    """

    values: tuple[str, ...]
    sentences: tuple[str, ...]
    questions: tuple[str, ...]


ATTRIBUTES = {
    "home": Attribute(
        _words("Paris London Rome Cairo Lima Delhi Tokyo Oslo"),
        ("{who} lives in {value}.", "the home of {who} is {value}.", "in {value} lives {who}.",
         "{value} is the home of {who}."),
        ("Where does {who} live?", "Which city is the home of {who}?", "In which city does {who} live?",
         "Tell me the home of {who}."),
    ),
    "work": Attribute(
        _words("baker doctor tailor painter farmer sailor teacher singer"),
        ("{who} works as a {value}.", "the work of {who} is that of a {value}.", "a {value} by trade is {who}.",
         "by trade {who} is a {value}."),
        ("What work does {who} do?", "What is the trade of {who}?", "Which trade does {who} have?",
         "Tell me the work of {who}."),
    ),
    "pet": Attribute(
        _words("cat dog parrot rabbit pony goat turtle mouse"),
        ("{who} keeps a {value}.", "the pet of {who} is a {value}.", "a {value} is the pet of {who}.",
         "with {who} lives a {value}."),
        ("Which pet does {who} keep?", "What is the pet of {who}?", "What pet lives with {who}?",
         "Tell me the pet of {who}."),
    ),
    "music": Attribute(
        _words("flute piano harp drum violin guitar cello trumpet"),
        ("{who} plays the {value}.", "the music of {who} is the {value}.", "the {value} is played by {who}.",
         "on the {value} plays {who}."),
        ("What does {who} play?", "Which music does {who} play?", "What is played by {who}?",
         "Tell me the music of {who}."),
    ),
}


@dataclasses.dataclass(frozen=True)
class Skill:
    """An operation or a format: what it does to a list of words, how one asks for it, and how text remarks on it."""

    apply: Callable[[list[str]], list[str]]
    asks: tuple[str, ...]
    remarks: tuple[str, ...]


OPERATIONS = {
    "copy": Skill(lambda w: w, ("keep the order", "copy the words", "repeat the list"), ("again", "as it was")),
    "reverse": Skill(
        lambda w: w[::-1],
        ("reverse the order", "turn the list around", "say it backwards"),
        ("backwards", "turned around"),
    ),
    "rotate": Skill(
        lambda w: w[1:] + w[:1],
        ("move the first word to the end", "put the first word last", "send the first word to the end"),
        ("with the first word last", "the first word moved to the end"),
    ),
    "behead": Skill(
        lambda w: w[1:],
        ("drop the first word", "leave out the first word", "remove the first word"),
        ("without the first word", "the first word left out"),
    ),
    "curtail": Skill(
        lambda w: w[:-1],
        ("drop the last word", "leave out the last word", "remove the last word"),
        ("without the last word", "the last word left out"),
    ),
    "swap": Skill(
        lambda w: [w[-1], *w[1:-1], w[0]],
        ("swap the first and last words", "exchange the first and last words", "trade the first and last words"),
        ("with the first and last words exchanged", "the first and last words swapped"),
    ),
    "head": Skill(
        lambda w: w[:2],
        ("keep only the first two words", "take just the first two words", "say only the first two words"),
        ("only the first two words", "just the first two"),
    ),
    "tail": Skill(
        lambda w: w[-2:],
        ("keep only the last two words", "take just the last two words", "say only the last two words"),
        ("only the last two words", "just the last two"),
    ),
}

FORMATS = {
    "commas": Skill(
        lambda w: " , ".join(w).split(),
        ("use commas", "put commas between the words", "separate with commas"),
        ("with commas", "commas between"),
    ),
    "dashes": Skill(
        lambda w: " - ".join(w).split(),
        ("use dashes", "put dashes between the words", "separate with dashes"),
        ("with dashes", "dashes between"),
    ),
    "brackets": Skill(
        lambda w: ["[", *w, "]"],
        ("use brackets", "put it in brackets", "write it inside brackets"),
        ("in brackets", "inside brackets"),
    ),
    "numbers": Skill(
        lambda w: [part for n, word in enumerate(w, 1) for part in (str(n), word)],
        ("use numbers", "number the words", "count them"),
        ("with numbers", "counted"),
    ),
    "capitals": Skill(
        lambda w: [CAPITALS[word] for word in w],
        ("use capitals", "write it in capitals", "make it loud"),
        ("in capitals", "loud"),
    ),
    "twice": Skill(
        lambda w: [part for word in w for part in (word, word)],
        ("say each word twice", "double each word", "write each word twice"),
        ("each word twice", "each doubled"),
    ),
    "label": Skill(
        lambda w: ["list", ":", *w],
        ("begin with list", "put list in front", "add the label list"),
        ("with list in front", "begun with list"),
    ),
}

LIST_REQUESTS = (
    "Please {ask} and {form}: {words}",
    "Take {words}, {ask} and {form}.",
    "Here is {words}: {ask} and {form}.",
    "Please {form} and {ask}: {words}",
)

VERSE_REQUESTS = (
    "Write a line with {u} and {v} that ends with {z}.",
    "Give me a line about {u} and {v} with {z} at the end.",
    "Write verse about {u} and {v}. End with {z}.",
    "Please end a line with {z} that has {u} and {v}.",
)

VERBS = _words("sings calls waits sleeps turns shines dreams listens")
PLACES = _words("under over near behind beyond below")
QUALITIES = _words("old quiet golden silver lonely bright distant gentle")
FRAMES = (
    "the {quality} {u} {verb} {place} the {v} and the {z}",
    "{place} the {v} the {u} {verb} for the {quality} {z}",
    "the {u} and the {v} {verb2} to the {quality} {z}",
    "a {quality} {u} {verb} where the {v} meets the {z}",
)


def shuffled(items: Iterable[str], *key: object) -> list[str]:
    """`items` in an order that depends on the key and nothing else: no version of any library changes it."""
    return sorted(items, key=lambda item: hashlib.sha256(repr((*key, item)).encode()).digest())


def people_facts(seed: int) -> dict[tuple[str, str], str]:
    """(person, attribute) -> value; every value belongs to equally many people, in no order."""
    facts = {}
    for name, attribute in ATTRIBUTES.items():
        for at, who in enumerate(shuffled(PEOPLE, seed, name)):
            facts[who, name] = attribute.values[at % len(attribute.values)]
    return facts


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def draw_list(rng: np.random.Generator, shortest: int = 3, longest: int = 5) -> list[str]:
    """Different nouns."""
    chosen = rng.choice(len(NOUNS), rng.integers(shortest, longest + 1), replace=False)
    return [NOUNS[at] for at in chosen]


def verse(rng: np.random.Generator, u: str, v: str, z: str) -> str:
    """A line with u and v that ends with z."""
    if rng.random() < 0.5:
        u, v = v, u
    verb, frame = pick(rng, VERBS), pick(rng, FRAMES)
    quality, place = pick(rng, QUALITIES), pick(rng, PLACES)
    return frame.format(u=u, v=v, z=z, quality=quality, place=place, verb=verb, verb2=verb[:-1])


def join(words: list[str]) -> str:
    """Words as text: no space before punctuation nor inside brackets."""
    text = " ".join(words)
    for spaced, tight in ((" ,", ","), (" .", "."), (" :", ":"), (" ?", "?"), ("[ ", "["), (" ]", "]")):
        text = text.replace(spaced, tight)
    return text


def vocabulary() -> list[str]:
    """Every word and mark that text, instructions or answers may hold, in a fixed order."""
    skills = [*OPERATIONS.values(), *FORMATS.values()]
    texts = [
        "\n system user assistant",
        *NOUNS, *CAPITALS.values(), *PEOPLE,
        *(text for a in ATTRIBUTES.values() for text in (*a.values, *a.sentences, *a.questions)),
        *(text for skill in skills for text in (*skill.asks, *skill.remarks, *skill.apply(list(NOUNS[:5])))),
        *LIST_REQUESTS, *VERSE_REQUESTS, *FRAMES, *VERBS, *(verb[:-1] for verb in VERBS), *PLACES, *QUALITIES,
    ]  # fmt: skip
    return list(dict.fromkeys(word for text in texts for word in WORD.findall(re.sub(r"{\w+}", " ", text))))
