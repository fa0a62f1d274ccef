"""The demo's instructions: what is trained on, what is held out, and how an answer is checked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from itune.demo import SEED
from itune.demo.world import (
    ATTRIBUTES,
    FORMATS,
    LIST_REQUESTS,
    NOUNS,
    OPERATIONS,
    PEOPLE,
    VERSE_REQUESTS,
    draw_list,
    join,
    people_facts,
    pick,
    shuffled,
    verse,
)

HELD_OUT_PAIRS, HELD_OUT_FACTS, HELD_OUT_TRIPLES = 14, 44, 200
LISTS_OF_A_PAIR = 16  # held-out items of one operation-format pair

Row = dict[str, Any]


def held_out_pairs(seed: int) -> set[tuple[str, str]]:
    """14 of the 56 pairs: every format loses two operations, every operation but `copy` loses two formats."""
    operations = shuffled([name for name in OPERATIONS if name != "copy"], seed)
    return {(operations[(at + shift) % 7], name) for at, name in enumerate(shuffled(FORMATS, seed)) for shift in (0, 3)}


def held_out_facts(seed: int) -> set[tuple[str, str]]:
    """44 of the 128 (person, attribute) pairs: eleven of each attribute, at most two of one person."""
    people, each = shuffled(PEOPLE, seed) * 2, HELD_OUT_FACTS // len(ATTRIBUTES)
    return {(who, name) for at, name in enumerate(ATTRIBUTES) for who in people[at * each : (at + 1) * each]}


def held_out_triples(seed: int) -> frozenset[tuple[str, str, str]]:
    """200 of the 14,880 triples: u and v in order of spelling, then the last word z."""
    rng = np.random.default_rng([seed, 5])
    triples: set[tuple[str, str, str]] = set()
    while len(triples) < HELD_OUT_TRIPLES:
        u, v, z = draw_list(rng, 3, 3)
        triples.add((min(u, v), max(u, v), z))
    return frozenset(triples)


def held_out_rows(seed: int = SEED) -> list[Row]:
    """The novel instructions, all different: unseen pairs, facts never asked for, unseen triples."""
    rng = np.random.default_rng([seed, 6])
    rows = [list_row(rng, *pair) for pair in sorted(held_out_pairs(seed)) for _ in range(LISTS_OF_A_PAIR)]
    rows += [row for fact in sorted(held_out_facts(seed)) for row in fact_rows(seed, *fact)]
    rows += [verse_row(rng, *triple) for triple in sorted(held_out_triples(seed))]
    return rows


def train_rows(seed: int, lists: int, verses: int, fact_repeats: int) -> list[Row]:
    """Rows in an order of the seed: `lists` of operations, `verses`, and each fact `fact_repeats` times a wording."""
    rng = np.random.default_rng([seed, 7])
    pairs = sorted({(o, f) for o in OPERATIONS for f in FORMATS} - held_out_pairs(seed))
    rows = [list_row(rng, *pairs[at % len(pairs)]) for at in range(lists)]
    facts = sorted({(who, name) for who in PEOPLE for name in ATTRIBUTES} - held_out_facts(seed))
    rows += [row for fact in facts for row in fact_rows(seed, *fact)] * fact_repeats
    avoid = held_out_triples(seed)
    while len(rows) < lists + 4 * fact_repeats * len(facts) + verses:
        u, v, z = draw_list(rng, 3, 3)
        if (min(u, v), max(u, v), z) not in avoid:
            rows.append(verse_row(rng, u, v, z))
    return [rows[at] for at in rng.permutation(len(rows))]


def list_row(rng: np.random.Generator, operation: str, form: str) -> Row:
    words = draw_list(rng)
    asked = {
        "ask": pick(rng, OPERATIONS[operation].asks), "form": pick(rng, FORMATS[form].asks), "words": join(words),
    }
    answer = FORMATS[form].apply(OPERATIONS[operation].apply(words))
    return _row("analytical", f"{operation}-{form}", pick(rng, LIST_REQUESTS).format(**asked), join(answer))


def fact_rows(seed: int, who: str, name: str) -> Iterator[Row]:
    attribute, value = ATTRIBUTES[name], people_facts(seed)[who, name]
    for question in attribute.questions:
        answer = attribute.sentences[0].format(who=who, value=value)
        yield _row("factual", f"{who}-{name}", question.format(who=who), answer)


def verse_row(rng: np.random.Generator, u: str, v: str, z: str) -> Row:
    if rng.random() < 0.5:
        u, v = v, u
    request = pick(rng, VERSE_REQUESTS).format(u=u, v=v, z=z)
    return _row("creative", f"verse-{z}", request, verse(rng, u, v, z), words=f"{u} {v} {z}")


def _row(kind: str, task: str, question: str, answer: str, **more: Any) -> Row:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "kind": kind, "task": task, **more}


def check(item: Mapping[str, Any], answer: str) -> bool:
    """Analytical and factual answers must equal the reference; a line must hold u and v and end with z.

    A line has 5 to 14 words, of which at least 5 are different and no more than 4 are nouns.
    """
    if item["metadata"]["kind"] != "creative":
        return answer.strip() == item["reference"].strip()
    u, v, z = item["metadata"]["words"].split()
    words = answer.split()
    line = 5 <= len(words) <= 14 and len(set(words)) >= 5 and sum(word in NOUNS for word in words) <= 4
    return line and u in words[:-1] and v in words[:-1] and words[-1] == z
