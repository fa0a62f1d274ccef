"""Broken pairs: single judgements both ways, and precision and recall of every kind on planted defects."""

import numpy as np
import pytest

from itune.data import broken, languages, planting, privacy
from itune.data.broken import find_broken
from itune.types import Address, Conversation, Message


def row(prompt, answer, **metadata):
    return Conversation((Message("user", prompt), Message("assistant", answer)), Address("f", "f.jsonl", 1), metadata)


def kinds_of(prompt, answer):
    return {found.filter for found in find_broken([row(prompt, answer)])}


@pytest.mark.parametrize(
    ("prompt", "answer", "kind"),
    [
        ("Name a colour.", " \u200b\n", "empty"),
        ("Name a colour.", "...", "empty"),
        ("Name a colour.", "[insert your answer here]", "placeholder"),
        ("Name a colour.", "N/A", "placeholder"),
        ("Name a colour.", "???", "placeholder"),
        ("How do I bake bread?", "I'm sorry, but I cannot help with that.", "refusal"),
        ("How do I bake bread?", "As an AI language model, I do not eat bread.", "refusal"),
        ("How do I bake bread?", "First you mix the flour with the water and then you wait for the", "truncated"),
        ("Sort these numbers in Python.", "Here it is:\n```python\nprint(sorted(x))", "truncated"),
        ("Who wrote this book?", "Это написал мой друг.", "script"),
        ("Who wrote this book?", "北京", "script"),
        ("Why do the children like the park?", "Porque los niños juegan allí con el perro de la casa.", "language"),
        ("Summarize the following article:", "The mayor resigned.", "missing_input"),
        ("Translate this sentence into French.", "Le chat dort.", "missing_input"),
        ("What is the tallest mountain in Europe?", "What is the tallest mountain in Europe?", "echo"),
        ("Anna has two cats. How many cats does Anna have?", "How many cats does Anna have?", "echo"),
    ],
)
def test_broken_pairs_are_found(prompt, answer, kind):
    assert kind in kinds_of(prompt, answer)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("How many stars?", "★★★★"),
        ("Which of these? Answer none if there is none.", "none"),
        ("If you cannot tell, say: No I can't help with that.", "No I can't help with that."),
        ("Describe my situation: I fell in love.", "I can't help but be drawn to her."),
        ("Name three fruits.", "- apple\n- pear\n- plum"),
        ("How do I bake bread?", "Mix, knead, wait, bake; see https://bread.example/how"),
        ("Translate 'cat' into Russian.", "кошка"),
        ("How do you say good morning in Spanish?", "Se dice buenos días, y por la tarde buenas tardes."),
        ("What is the Greek letter for the angle?", "\u03b1"),
        ("Summarize the following article: The mayor resigned on Monday after a vote.", "The mayor resigned."),
        ("Correct the grammar: he go to school.", "He goes to school."),
        ("The weather is bad today. Rewrite this sentence.", "Today the weather is bad."),
        ("Repeat after me: the sky is blue and wide.", "The sky is blue and wide."),
        ("Where is the tower?", "The tower is in Paris, near the river."),
    ],
)
def test_sound_pairs_are_left_alone(prompt, answer):
    assert kinds_of(prompt, answer) == set()


def test_every_answer_of_a_conversation_is_judged_once_a_kind_and_context_counts_as_input():
    messages = [Message("user", "The mayor resigned on Monday."), Message("assistant", "TODO")]
    messages += [Message("user", "Summarize the text above."), Message("assistant", "TBD")]
    found = find_broken([Conversation(tuple(messages), Address("f", "f.jsonl", 4))])
    assert [(each.filter, each.address) for each in found] == [("placeholder", "f.jsonl:4")]
    unweighted = Conversation((Message("user", "Hi"), Message("assistant", "TODO", weight=0.0)), Address("f"))
    assert find_broken([unweighted]) == []


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("The dog and the cat are in the house of my friend.", "English"),
        ("Der Hund und die Katze sind nicht in dem Haus.", "German"),
        ("Le chien et le chat sont dans la maison de mon ami.", "French"),
        ("El perro y el gato están en la casa de mi amigo.", "Spanish"),
        ("De hond en de kat zijn niet in het huis.", "Dutch"),
        ("Pies i kot nie są w domu, ale to jest dobrze.", "Polish"),
        ("x = 3", ""),
    ],
)
def test_language_by_function_words(text, language):
    assert languages.language(text)[0] == language


# the floors lie below what docs/data_quality.md measured, by about the width of the interval
FLOORS = {
    "empty": (0.97, 0.97), "placeholder": (0.95, 0.95), "refusal": (0.9, 0.9), "truncated": (0.88, 0.62),
    "script": (0.95, 0.9), "language": (0.88, 0.85), "missing_input": (0.88, 0.8), "echo": (0.92, 0.88),
    "secret": (0.97, 0.97), "personal": (0.9, 0.95),
}  # fmt: skip


@pytest.mark.parametrize("kind", FLOORS)
def test_precision_and_recall_on_planted_defects(real_rows, kind):
    """On a seed that no rule was written on. What is found in real rows counts as wrong, even where it is right."""
    rng = np.random.default_rng(105)
    chosen = rng.permutation(len(real_rows["p3_sample"]))[:2100]
    base = [real_rows["p3_sample"][i] for i in chosen] + real_rows["gsm8k_messages"][:700] + real_rows["seed_tasks"]
    planted = planting.plant(base, kind, 0.05, seed=105)
    find = privacy.find_private if kind in ("secret", "personal") else find_broken
    found = {each.index for each in find(planted.conversations, [kind])}
    right = found & set(planted.truth)
    precision, recall = FLOORS[kind]
    assert len(right) / len(found) >= precision
    assert len(right) / len(planted.truth) >= recall


@pytest.mark.parametrize("length", [10, 100_000])
def test_long_texts_take_no_quadratic_time(length):
    text = "please answer the following question about " * (length // 43 + 1)
    assert broken.find_broken([row(text, text[:-3]), row("a" * length, "I " * length)]) is not None
