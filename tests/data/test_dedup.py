"""Duplicates: exact after normalising, near by exact Jaccard, nothing that only looks alike, and large groups."""

import numpy as np
import pytest

from itune.data import dedup, planting
from itune.types import Address, Conversation, Message


def pair(prompt, answer, line=1, system=""):
    start = (Message("system", system),) if system else ()
    messages = (*start, Message("user", prompt), Message("assistant", answer))
    return Conversation(messages, Address("file", "file.jsonl", line))


def test_exact_duplicates_name_the_row_that_stays():
    rows = [
        pair("What is 2 + 2?", "4", 1),
        pair("what is  2 + 2", "4.", 2),
        pair("What is 2 + 2?", "5", 3),
        pair("", "", 4),
        pair("", "", 5),
        pair("What is 2 + 2?", "4", 6, system="Be brief."),
    ]
    found = dedup.find_duplicates(rows)
    assert [(each.filter, each.address, each.other_address) for each in found] == [
        ("exact_duplicate", "file.jsonl:2", "file.jsonl:1"),
        ("exact_duplicate", "file.jsonl:6", "file.jsonl:1"),  # system prompts are shared by thousands of rows
    ]


BASE = "The committee met on a cold morning in the small library near the station to discuss a new timetable of trains"


@pytest.mark.parametrize(
    ("prompt", "answer", "near"),
    [
        (BASE + " today", "It did.", True),
        (BASE.replace("morning", "mornnig"), "It did!", True),
        (BASE, "Nobody knows what came of that.", False),  # the same question, another answer
        ("Something else entirely was asked here", "It did.", False),
    ],
)
def test_near_duplicates_need_question_and_answer(prompt, answer, near):
    found = dedup.find_duplicates([pair(BASE, "It did."), pair(prompt, answer, 2)])
    assert [each.filter for each in found] == (["near_duplicate"] if near else [])


def test_other_numbers_are_another_question():
    text = "A train travels from the old town to the harbour at {} kilometres an hour; how long does it take to arrive?"
    rows = [pair(text.format(60), "Quite long."), pair(text.format(80), "Quite long.", 2)]
    assert dedup.find_duplicates(rows) == []
    assert len(dedup.find_duplicates(rows, same_numbers=False)) == 1


def test_only_prompts_can_be_compared():
    rows = [pair(BASE, "It did."), pair(BASE + "!", "Nobody knows.", 2)]
    assert [each.filter for each in dedup.find_duplicates(rows, parts_of=dedup.question)] == ["exact_duplicate"]


def test_minhash_estimates_jaccard():
    rng = np.random.default_rng(0)
    words = [f"w{i}x{i * 7 % 13}" for i in range(400)]
    texts = [" ".join(rng.choice(words, 200)) for _ in range(20)]
    texts += [" ".join(text.split()[:150] + list(rng.choice(words, 50))) for text in texts]
    signatures = dedup.minhash(texts)
    for one in range(20):
        sets = [np.unique(dedup._shingles([texts[row]])[0]) for row in (one, one + 20)]
        exact = dedup._jaccard(*sets)
        assert (signatures[one] == signatures[one + 20]).mean() == pytest.approx(exact, abs=0.17)


def test_the_search_finds_what_comparing_all_pairs_finds(real_rows):
    rows = real_rows["p3_sample"][:500]
    parts = [tuple(dedup.words.normalise(part) for part in dedup.question_and_answer(row)) for row in rows]
    unique = [i for i, original in enumerate(dedup.exact_duplicates(parts)) if original < 0]
    sets = [[np.unique(dedup._shingles([text])[0]) for text in parts[i]] for i in unique]
    matched = set()
    for row in range(len(unique)):
        for other in range(row):
            sizes = [len(side[0]) for side in (sets[row], sets[other])]
            if other in matched or min(sizes) < 0.7 * max(sizes):
                continue
            if min(dedup._jaccard(*both) for both in zip(sets[row], sets[other])) >= 0.7:
                matched.add(row)
                break
    found = {row for row, _, _ in dedup.near_duplicates([parts[i] for i in unique])}
    assert matched and len(found & matched) >= 0.97 * len(matched) and found <= matched


@pytest.mark.parametrize("seed", [101])
def test_planted_duplicates_are_found(real_rows, seed):
    base = real_rows["gsm8k_messages"][:800]
    rows, truth = planting.plant_pairs(base, ["exact_duplicate", "near_duplicate"], 0.1, seed)
    found = {each.index: each for each in dedup.find_duplicates(rows)}
    for kind in truth:
        hits = [row for row, origin in truth[kind].items() if row in found and found[row].other == origin]
        assert len(hits) >= 0.95 * len(truth[kind]), kind
    assert sum(row < len(base) for row in found) <= 0.01 * len(base)


def test_a_large_group_of_copies_takes_no_quadratic_time():
    rows = [pair(BASE + " " + "abcdefghij"[i % 10] * (i // 10 % 7), "It did.", i + 1) for i in range(4000)]
    found = dedup.find_duplicates(rows)
    assert len(found) >= 3990
