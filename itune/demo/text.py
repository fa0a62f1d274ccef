"""The pretraining text of the demo's base model: facts, remarks on lists, and verse. No instruction, no answer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from itune.demo.world import ATTRIBUTES, FORMATS, OPERATIONS, PEOPLE, draw_list, join, people_facts, pick, verse


def documents(seed: int, count: int, avoid: frozenset[tuple[str, str, str]] = frozenset()) -> list[str]:
    """`count` short texts. No verse is about a triple of `avoid` (u and v in order of spelling, then the last word)."""
    rng = np.random.default_rng([seed, 2])
    facts = people_facts(seed)
    kinds: tuple[Callable[[], str], ...] = (
        lambda: _portrait(rng, facts),
        lambda: _remarks(rng),
        lambda: _verse(rng, avoid),
    )
    return [kinds[rng.integers(len(kinds))]() for _ in range(count)]


def _portrait(rng: np.random.Generator, facts: dict[tuple[str, str], str]) -> str:
    """Everything known of one person, in any order and wording."""
    who = pick(rng, PEOPLE)
    sentences = [
        pick(rng, ATTRIBUTES[name].sentences).format(who=who, value=facts[who, name])
        for name in rng.permutation(list(ATTRIBUTES))
    ]
    return " ".join(sentences)


def _remarks(rng: np.random.Generator) -> str:
    """A list, then what it looks like after one operation, or in one format: never both at once."""
    words = draw_list(rng)
    parts = [join(words) + "."]
    for _ in range(2):
        skills = OPERATIONS if rng.random() < 0.5 else FORMATS
        skill = skills[pick(rng, list(skills))]
        parts.append(f"{pick(rng, skill.remarks)}: {join(skill.apply(words))}.")
    return " ".join(parts)


def _verse(rng: np.random.Generator, avoid: frozenset[tuple[str, str, str]]) -> str:
    """A title and a line."""
    while True:
        u, v, z = draw_list(rng, 3, 3)
        if (min(u, v), max(u, v), z) not in avoid:
            return f"the {u}, the {v}, the {z}. {verse(rng, u, v, z)}."
