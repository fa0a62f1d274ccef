"""Contradictions: single judgements, groups and majorities, and the gates on planted defects among real rows."""

import numpy as np
import pytest

from itune.data import planting, questions
from itune.data.answers import Answer, incompatible
from itune.data.contradictions import find_contradictions, minority
from itune.types import Address, Conversation, Message


def pair(prompt, answer, line=1):
    return Conversation((Message("user", prompt), Message("assistant", answer)), Address("f", "f.jsonl", line))


def judge(prompt, left, right):
    return incompatible(Answer.of(left), Answer.of(right), prompt, questions.open_ended(prompt))


@pytest.mark.parametrize(
    ("prompt", "left", "right", "reason"),
    [
        ("Is Pluto a planet?", "No", "Yes, it is.", "label"),
        ("Which one is right? A, B or C", "(A)", "C.", "option"),
        ("How many clips did she sell?", "She sold 48 + 24 = 72. The answer is 72.", "48 + 24 = 73. The answer is 73.",
         "final answer"),
        ("When did they land on the moon?", "They landed on July 20, 1969.", "They landed on July 20, 1968.", "number"),
        ("Does it rain there?", "It is often wet in that valley.", "It is not often wet in that valley.", "negation"),
        ("What happens to the volume?", "The volume will increase.", "The volume will decrease.", "opposite"),
        ("Is the review flattering or unflattering?", "flattering", "unflattering", "opposite"),
        ("Who painted it?", "It was painted by Vermeer in the town.",
         "It was painted by Rembrandt in the town.", "name"),
        ("What is the capital of France?", "Paris", "The capital of France is Lyon.", "divergent"),
        ("How much did he pay?", "He paid 12 dollars", "a green bicycle", "divergent"),
        ("Write a haiku about the summer sea", "The summer sea glows\nwaves hum to the sand\ngulls dream of ships",
         "def reverse(items):\n    return items[::-1]", "unrelated"),
    ],
)  # fmt: skip
def test_incompatible_answers(prompt, left, right, reason):
    assert judge(prompt, left, right) == reason
    assert judge(prompt, right, left) == reason


@pytest.mark.parametrize(
    ("prompt", "left", "right"),
    [
        ("What is the capital of France?", "Paris", "The capital of France is Paris."),
        ("How many clips did she sell?", "48 + 24 = 72. The answer is 72.", "Adding 24 to 48 gives 72."),
        ("How many people live there?", "1,000", "1000 people"),
        ("Is it true?", "Yes", "Yes, it is true because water expands."),
        ("Write a poem about the sea", "Blue and wide and deep", "A salty wind sings over foam"),
        ("Suggest a name for my cat", "Luna", "Mister Whiskers"),
        ("Which agency runs it?", "NASA", "National Aeronautics and Space Administration"),
        ("Who is it?", "Barack Obama", "Obama"),
        ("Which city?", "Reykjavik", "Reykjavík"),
        ("What is it?", "", "something"),
        ("Where is it?", "Don't know", "Do not know"),
    ],
)
def test_compatible_answers(prompt, left, right):
    assert judge(prompt, left, right) == judge(prompt, right, left) == ""


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        ("What is the capital of Peru?", "Could you please tell me what the capital of Peru is? Thanks!", True),
        ("What is the capital of Peru?", "Question: what is the capital of Peru\n\nAnswer:", True),
        ("What is the capital of Peru?", "What is the capital of Chile?", False),
        ("Add 3 and 5", "Add 3 and 6", False),
        ("Is a < b if a = 2?", "Is a > b if a = 2?", False),
        ("Who was born before Mozart?", "Who was born after Mozart?", False),
        ("Is the bridge open to cars and trucks?", "Is the bridge not open to cars and trucks?", False),
        ("flights from Oslo to Rome", "flights from Rome to Oslo", False),
    ],
)
def test_same_question(left, right, same):
    rows = [pair(left, "one thing", 1), pair(right, "another matter", 2)]
    tokens = [questions.tokens(text) for text in (left, right)]
    found = questions.same_question_pairs(tokens).tolist() == [[0, 1]] and questions.same_question(*tokens)
    assert found == same
    assert bool(find_contradictions(rows)) == same


def test_pairs_by_brute_force():
    """The search by hashes gives every pair that the definition gives, and no row with itself."""
    rng = np.random.default_rng(3)
    rows = [[str(word) for word in rng.integers(0, 6, rng.integers(1, 9))] for _ in range(300)]
    found = {tuple(each) for each in questions.same_question_pairs(rows, most=300).tolist()}
    expected = {(i, j) for j in range(300) for i in range(j) if questions.same_question(rows[i], rows[j])}
    assert expected - found == set() and all(i < j for i, j in found)
    assert {(i, j) for j in range(300) for i in range(j) if sorted(rows[i]) == sorted(rows[j])} <= found


def test_majority_keeps_the_most_frequent_answer_and_a_tie_keeps_none():
    prompt = "In which year did the bridge open?"
    rows = [pair(prompt, "1932", 1), pair(prompt, "1932.", 2), pair(prompt, "1935", 3), pair("A colour?", "red", 4)]
    found = find_contradictions(rows)
    assert minority(found, rows) == [2]
    assert minority(find_contradictions(rows[1:]), rows[1:]) == [0, 1]
    assert found[0].address == "f.jsonl:3" and found[0].other_address == "f.jsonl:1"


def test_a_question_with_many_different_answers_has_no_right_one():
    answers = ["Anna Karenina", "Moby Dick", "Ulysses", "Middlemarch", "Emma", "Beloved"]
    rows = [pair("Which novel lies on the table?", answer, line) for line, answer in enumerate(answers)]
    assert find_contradictions(rows) == []
    assert len(find_contradictions(rows[:2])) == 1


def test_the_last_answer_is_judged_in_its_context():
    def talk(first, last):
        messages = [Message("user", first), Message("assistant", "Fine."), Message("user", "And the capital?")]
        return Conversation((*messages, Message("assistant", last)), Address("f", "f.jsonl", 1))

    peru, chile = "Let us talk about Peru.", "Let us talk about Chile."
    assert find_contradictions([talk(peru, "Lima"), talk(chile, "Santiago")]) == []
    assert len(find_contradictions([talk(peru, "Lima"), talk(peru, "Cusco")])) == 1


def pool(real_rows, seed, rows=1800):
    rng = np.random.default_rng(seed)
    parts = [("p3_sample", int(0.7 * rows)), ("gsm8k_messages", int(0.25 * rows))]
    chosen = [real_rows[name][i] for name, count in parts for i in rng.permutation(len(real_rows[name]))[:count]]
    return chosen + real_rows["seed_tasks"]


def test_gate_on_planted_contradictions(real_rows):
    """The gate of issue 4: the mean of three seeds that nothing was tuned on, benign twins and siblings planted too."""
    precisions, recalls = [], []
    for seed in (101, 102, 103):
        kinds = ["contradiction", "benign_duplicate", "sibling"]
        rows, truth = planting.plant_pairs(pool(real_rows, seed), kinds, 0.05, seed)
        right, wrong = planting.judge_pairs(find_contradictions(rows), truth, "contradiction")
        precisions.append(len(right) / (len(right) + len(wrong)))
        recalls.append(len(right) / len(truth["contradiction"]))
    assert np.mean(precisions) >= 0.90
    assert np.mean(recalls) >= 0.85  # the goal; 0.75 is what is promised
