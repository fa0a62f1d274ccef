"""The demo's world is honest: what is held out is in no training row, the text states facts and instructs nobody."""

from __future__ import annotations

import itertools

import pytest

from itune.demo import SEED, tasks, text
from itune.demo.world import ATTRIBUTES, FORMATS, OPERATIONS, PEOPLE, WORD, join, people_facts, vocabulary

TRAIN = tasks.train_rows(SEED, 2000, 1000, 1)
HELD_OUT = tasks.held_out_rows(SEED)
DOCUMENTS = text.documents(SEED, 4000, tasks.held_out_triples(SEED))


def question(row):
    return row["messages"][0]["content"]


def answer(row):
    return row["messages"][1]["content"]


def item(row):
    return {"reference": answer(row), "metadata": row}


def test_held_out_prompts_are_many_different_and_not_trained_on():
    prompts = {question(row) for row in HELD_OUT}
    assert len(prompts) == len(HELD_OUT) == 14 * 16 + 44 * 4 + 200
    assert prompts.isdisjoint(question(row) for row in TRAIN)


def test_pairs_and_facts_are_held_out_whole():
    tasks_of = {kind: {row["task"] for row in rows} for kind, rows in
                (("train", TRAIN), ("held out", HELD_OUT))}
    pairs = {f"{operation}-{form}" for operation, form in tasks.held_out_pairs(SEED)}
    assert len(pairs) == 14
    assert len(tasks.held_out_facts(SEED)) == 44
    assert pairs <= tasks_of["held out"] and pairs.isdisjoint(tasks_of["train"])
    common = {task for task in tasks_of["train"] & tasks_of["held out"] if not task.startswith("verse")}
    assert not common
    # every operation, format, person and attribute of a held-out task is trained on in other company
    seen = {part for row in TRAIN if row["kind"] != "creative" for part in row["task"].split("-")}
    assert seen == {*OPERATIONS, *FORMATS, *PEOPLE, *ATTRIBUTES}


def test_triples_are_held_out_of_training_and_of_the_text():
    held = tasks.held_out_triples(SEED)
    verses = [row["words"].split() for row in TRAIN if row["kind"] == "creative"]
    trained = {(*sorted(words[:2]), words[2]) for words in verses}
    assert len(held) == 200 and held.isdisjoint(trained) and len(trained) > 900
    titles = [WORD.findall(line.split(". ")[0]) for line in DOCUMENTS if line.startswith("the ") and "," in line]
    told = {(*sorted((words[1], words[4])), words[7]) for words in titles if len(words) == 8}
    assert len(told) > 1000 and held.isdisjoint(told)


def test_text_states_every_fact_and_no_pair():
    joined = "\n".join(DOCUMENTS)
    for (who, name), value in people_facts(SEED).items():
        assert any(form.format(who=who, value=value) in joined for form in ATTRIBUTES[name].sentences)
    for line in DOCUMENTS:  # an operation and a format never meet: each remark is about the list as it was given
        words = line.split(". ")[0].split()
        for remark in line.split(". ")[1:]:
            before, colon, after = remark.rstrip(".").partition(": ")
            if colon and all(word.islower() for word in words):
                skill = next(s for s in (*OPERATIONS.values(), *FORMATS.values()) if before in s.remarks)
                assert after == join(skill.apply(words))


def test_text_holds_no_question_and_no_request():
    joined = " ".join(DOCUMENTS)
    asks = [ask for skill in (*OPERATIONS.values(), *FORMATS.values()) for ask in skill.asks]
    marks = ("?", "Please", "Write", "Give", "Take", "Here", "user", "assistant", "<|")
    assert not [part for part in (*asks, *marks) if part in joined]


def test_every_word_is_in_the_vocabulary():
    known = set(vocabulary())
    texts = itertools.chain((m["content"] for row in TRAIN + HELD_OUT for m in row["messages"]), DOCUMENTS)
    assert {word for text in texts for word in WORD.findall(text)} <= known
    assert len(known) == len(vocabulary()) < 300


def test_answers_are_right_by_their_own_check():
    assert all(tasks.check(item(row), answer(row)) for row in TRAIN + HELD_OUT)


def test_answers_to_other_items_are_wrong():
    shifted = zip(HELD_OUT, HELD_OUT[1:] + HELD_OUT[:1], strict=True)
    accepted = [question(row) for row, other in shifted if answer(row) != answer(other)
                and tasks.check(item(row), answer(other))]  # fmt: skip
    assert not accepted


@pytest.mark.parametrize(
    "line, right",
    [
        ("the old river waits for the stone under the moon", True),
        ("the stone and the river sing to the quiet moon", True),
        ("river stone moon", False),  # no line
        ("the old river waits under the moon", False),  # a word is missing
        ("the old moon waits for the stone and the river", False),  # another end
        ("the river the stone the river the stone the moon", False),  # too few different words
        ("river stone bird fish road wind tree moon", False),  # a list of nouns
        ("", False),
    ],
)
def test_a_line_of_verse(line, right):
    row = {"kind": "creative", "words": "river stone moon"}
    assert tasks.check({"reference": "", "metadata": row}, line) is right
