"""Against the published test cases of rouge_score (Apache-2.0), and against it and NLTK where they are installed."""

import random

import pytest

from itune.evaluators.porter import stem
from itune.evaluators.rouge import longest_common_subsequence, rouge_l, score


# of rouge_scorer_test.py: Consecutive, NonConsecutive, Empty, Multi, SumSentenceSplitting without newlines
@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("testing one two", "testing one", 4 / 5),
        ("testing one two", "testing two", 4 / 5),
        ("testing one two", "testing", 1 / 2),
        ("testing one two", "", 0),
        ("", "testing", 0),
        ("first text", "text first", 1 / 2),
        ("First sentence. Second Sentence.", "Second sentence. First Sentence.", 0.5),
    ],
)
def test_published_cases(reference, answer, expected):
    assert rouge_l(reference, answer) == pytest.approx(expected, abs=1e-9)


def test_the_best_of_several_references_counts():
    item = {"reference": "first text", "metadata": {"references": ["first something", "text first"]}}
    assert score(item, "text first") == 1


@pytest.mark.parametrize(
    ("word", "expected"),
    [("caresses", "caress"), ("ponies", "poni"), ("ties", "tie"), ("agreed", "agre"), ("hopping", "hop"),
     ("falling", "fall"), ("hissing", "hiss"), ("failing", "fail"), ("filing", "file"), ("happy", "happi"),
     ("enjoy", "enjoy"), ("relational", "relat"), ("rationally", "ration"), ("geologically", "geolog"),
     ("hopefulness", "hope"), ("electrical", "electr"), ("adoption", "adopt"), ("rate", "rate"), ("cease", "ceas"),
     ("controll", "control"), ("roll", "roll"), ("skies", "sky"), ("is", "is"), ("dying", "die")],
)  # fmt: skip
def test_stems(word, expected):
    assert stem(word) == expected


def test_common_subsequence_against_the_table():
    draw = random.Random(0)
    for _ in range(300):
        one, other = ([draw.choice("abc") for _ in range(draw.randint(0, 12))] for _ in range(2))
        table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, x in enumerate(one):
            for j, y in enumerate(other):
                table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
        assert longest_common_subsequence(one, other) == table[-1][-1]


def test_equal_to_rouge_score_on_real_rows(shared_data):
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge_score comes with lm-eval: install it")
    import gzip
    import json

    judge = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    with gzip.open(shared_data / "p3_sample.jsonl.gz", "rt") as lines:
        rows = [json.loads(line) for line in lines][:4000:40]
    for row in rows:
        prompt = row["prompt"][:1000]
        wanted = judge.score(row["completion"], prompt)["rougeL"].fmeasure
        assert rouge_l(row["completion"], prompt) == pytest.approx(wanted, abs=1e-12)


def test_equal_to_nltk_on_real_words(shared_data):
    porter = pytest.importorskip("nltk.stem.porter", reason="nltk comes with lm-eval: install it")
    import gzip
    import re

    with gzip.open(shared_data / "p3_sample.jsonl.gz", "rt") as lines:
        words = {word for line in list(lines)[::4] for word in re.findall("[a-z]+", line.lower())}
    judge = porter.PorterStemmer()
    assert len(words) > 5000
    assert [(word, stem(word), judge.stem(word)) for word in words if stem(word) != judge.stem(word)] == []
