"""Held-out matches: similarity as defined, each detector, recall on real prompts, a proof that fails closed."""

import collections
import math

import numpy as np
import pytest

from itune.data import contamination, planting, similarity, words
from itune.data.contamination import METHODS, Comparison
from itune.data.heldout import decontaminate, prove, summary
from itune.types import Address, Conversation, InputError, Message, RunError


def ask(*prompts, source="train", line=1, answer="Yes."):
    messages = [m for prompt in prompts for m in (Message("user", prompt), Message("assistant", answer))]
    return Conversation(tuple(messages), Address(source, f"{source}.jsonl", line))


def vectors(texts):
    vocabulary = similarity.Vocabulary()
    counts = similarity.char_counts(vocabulary.encode(texts), vocabulary)
    return similarity.weighted(counts, similarity.document_frequency(counts), len(texts))


def reference_cosine(texts, one, other):
    """The same similarity with dictionaries, from its definition."""

    def grams(text):
        padded = [f" {word} " for word in words.words(text)]
        return collections.Counter(w[i : i + n] for w in padded for n in (3, 4, 5) for i in range(len(w) - n + 1))

    bags = [grams(text) for text in texts]
    frequency = collections.Counter(gram for bag in bags for gram in bag)
    idf = {gram: (math.log((5 + len(texts)) / (5 + count)) + 0.5) ** 2 for gram, count in frequency.items()}
    left, right = ({gram: count * idf[gram] for gram, count in bags[row].items()} for row in (one, other))
    norms = [math.sqrt(sum(value**2 for value in side.values())) for side in (left, right)]
    return sum(value * right.get(gram, 0.0) for gram, value in left.items()) / (norms[0] * norms[1])


def test_cosine_is_that_of_the_definition():
    texts = ["How many legs has a spider?", "how many legs have spiders", "Grüße aus München", "東京は日本の首都", "x"]
    matrix = vectors(texts)
    for one in range(4):
        for other in range(4):
            found = similarity.cosines(matrix, np.array([one]), matrix, np.array([other]))[0]
            assert found == pytest.approx(reference_cosine(texts, one, other), abs=1e-5)


def test_match_finds_what_the_full_product_finds(real_rows):
    texts = [words.prompt_text(row) for row in real_rows["p3_sample"][:1200]]
    matrix = vectors(texts)
    queries, base = matrix[:200], matrix[200:]
    full = (queries @ base.T).toarray()
    found = similarity.match(queries, base, 0.8)
    assert ((full >= 0.8).any(axis=0) == (found.query_of_base >= 0)).all()
    assert np.abs(full.max(axis=1) - found.nearest_score).max() < 0.02
    assert (np.abs(full.max(axis=1) - found.nearest_score) < 1e-5).mean() > 0.98


def test_match_of_nothing():
    empty = vectors(["a b c"])[:0]
    assert similarity.match(empty, vectors(["some text"]), 0.8).query_of_base.tolist() == [-1]
    assert similarity.match(vectors(["some text"]), empty, 0.8).nearest.tolist() == [-1]


@pytest.mark.parametrize(
    ("held_out", "training", "method"),
    [
        ("What is the capital of Peru?", "  what is the CAPITAL of Peru ?!", "exact"),
        ("Name three salty snacks", "I need help. Name three salty snacks. Thanks!", "containment"),
        ("Who wrote the novel about the whale", "Tell me who wrote the novel about the whale and why", "containment"),
        (
            "A train leaves the old town at nine and meets the slow freight at noon near the river bridge",
            "Long ago a train leaves the old town at nine and meets the slow freight at noon near the sea, they said, "
            "then a great many other things happened to all the people of that valley which nobody wrote down at all",
            "8-gram",
        ),
        (
            "Recommend inexpensive vegetarian restaurants around Barcelona's harbour",
            "Recommend some inexpensive vegetarian restaurants close to Barcelona's harbour",
            "tf-idf",
        ),
    ],
)
def test_each_method_catches_its_kind(held_out, training, method):
    others = ["Translate into French: the dog sleeps.", "Sort these numbers: 4, 8, 1.", "Write a poem on rain."]
    result = Comparison([held_out, "Why is the sky blue in summer?"], [*others, training]).overlap()
    assert result.match.tolist() == [-1, -1, -1, 0]
    assert METHODS[result.method[3]] == method


@pytest.mark.parametrize(
    ("held_out", "training"),
    [
        ("Write a poem", "Write a poem about the sea and the gulls"),  # no phrase of its own
        ("Hi", "Say hi to my friends in Oslo, please."),  # too short to be evidence
        ("What is 7 plus 5?", "What is 9 plus 4 times the root of eleven thousand?"),
    ],
)
def test_what_only_looks_alike_stays(held_out, training):
    assert Comparison([held_out], [training, "Name a river.", "Cook rice."]).overlap().match[0] == -1


def test_a_template_that_many_rows_share_is_no_evidence():
    template = "Read the review below carefully and say whether the writer liked the product. Review: {}. Liked it?"
    things = [
        "lamp", "kettle", "hammer", "bicycle", "trumpet", "carpet", "mirror", "blender",
        "anvil", "canoe", "pillow", "guitar", "ladder", "teapot",
    ]
    prompts = [template.format(thing) for thing in things]
    result = Comparison(prompts[:2], prompts[2:]).overlap()
    assert not (result.method[result.match >= 0] == METHODS.index("8-gram")).any()
    leaked = Comparison(prompts[:2], [*prompts[2:], prompts[0].upper()]).overlap()
    assert leaked.match[-1] == 0


def test_containment_by_brute_force():
    rng = np.random.default_rng(0)
    spelled = [f"word{letter}" for letter in "abcdefg"]
    texts = [" ".join(rng.choice(spelled, rng.integers(6, 30))) for _ in range(60)]
    short = [" ".join(rng.choice(spelled, rng.integers(6, 8))) for _ in range(200)]
    vocabulary = similarity.Vocabulary()
    queries, base = vocabulary.encode(short), vocabulary.encode(texts)
    match, _ = contamination._contained(queries, base, short, texts)
    expected = [any(f" {query} " in f" {text} " for query in short) for text in texts]
    assert (match >= 0).tolist() == expected
    assert 0 < sum(expected) < 60


LEAKS = ("leak_verbatim", "leak_cased", "leak_wrapped", "leak_paraphrased")


@pytest.mark.parametrize("seed", [101, 102, 103])
def test_recall_and_false_alarms_on_real_prompts(real_rows, seed):
    """The gate of issue 4, on short prompts, where it is hardest: seeds that no threshold was chosen on."""
    short = [row for row in real_rows["p3_sample"] if len(words.prompt_text(row).split()) < 60]
    short += real_rows["seed_tasks"]
    order = np.random.default_rng(seed).permutation(len(short))
    held, clean = [short[i] for i in order[:400]], [short[i] for i in order[400:]]
    planted = {kind: planting.plant(held, kind, 0.2, seed).conversations[len(held) :] for kind in LEAKS}
    rows = clean + [row for kind in LEAKS for row in planted[kind]]
    result = Comparison(*([words.prompt_text(row) for row in part] for part in (held, rows))).overlap()
    hit = result.match >= 0
    found = np.split(hit[len(clean) :], len(LEAKS))
    assert found[0].all(), "every verbatim copy is found"
    assert np.concatenate(found).mean() >= 0.85
    assert min(part.mean() for part in found) >= 0.75
    assert hit[: len(clean)].mean() <= 0.12


def test_decontaminate_reaches_a_state_that_the_proof_accepts(real_rows):
    rows = real_rows["p3_sample"][:1500]
    tasks = sorted({row.metadata["task"] for row in rows})
    held = [row for row in rows if row.metadata["task"] in tasks[::6]]
    train = [row for row in rows if row.metadata["task"] not in tasks[::6]]
    result = decontaminate(train, held, minimum=100)
    kept = [train[i] for i in result.train]
    assert len(kept) + len({found.index for found in result.findings}) == len(train)
    assert {train[found.index].address for found in result.findings}.isdisjoint(row.address for row in kept)
    assert all(str(train[found.index].address) == found.address for found in result.findings)
    proof = prove(kept, held, minimum=100)  # raises if anything were left
    assert proof["highest_score"] < 0.8 and len(proof["items"]) == len(held)
    assert all(len(item["sha256"]) == 64 and item["nearest"] for item in proof["items"])
    assert result.proof["removed"]["rows"] == len(result.findings) > 0
    assert "novel prompts" in summary(result.proof)
    if len(kept) < len(train):
        with pytest.raises(RunError, match="matches training row"):
            prove(train, held)


def test_too_few_novel_prompts_stop_the_run():
    train, held = [ask("What is the tallest tree?")], [ask("Name a mammal that flies.")] * 3
    with pytest.raises(InputError, match=r"1 distinct novel prompts remain of 3 items; data.novel_min asks for 2"):
        decontaminate(train, held, minimum=2)
    assert decontaminate(train, held, minimum=1).proof["novel_prompts"] == 1


def test_every_user_message_is_compared_and_the_benchmark_side_can_be_cleared_instead():
    leaked = "Which of the two brothers founded the first bakery in the harbour district?"
    train = [ask("Hello there!", leaked, "Thanks, bye.", line=7), ask("Draw a cat in ASCII.", line=8)]
    held = [ask(leaked, source="bench", line=3), ask("How do magnets work?", source="bench", line=4)]
    result = decontaminate(train, held)
    assert result.train == (1,) and result.held_out == (0, 1)
    assert (result.findings[0].address, result.findings[0].other_address) == ("train.jsonl:7", "bench.jsonl:3")
    other = decontaminate(train, held, remove="held_out")
    assert other.train == (0, 1) and other.held_out == (1,)
    assert other.findings[0].address == "bench.jsonl:3"
    with pytest.raises(InputError, match="'train' or 'held_out'"):
        decontaminate(train, held, remove="both")
