import pytest

from itune.evaluators.maths import extract, same, score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### $1,080\n", "$1,080"),
        (r"So \boxed{1} or rather $\boxed{\frac{3}{4}}$.", r"\frac{3}{4}"),
        (r"\boxed{a {b} c}", "a {b} c"),
        (r"open \boxed{3 and then 7", "7"),
        ("She has 5 apples. The answer is 10.", "10"),
        ("The answer is $1,234.50 a year, not 7.", "1,234.50"),
        ("Answer: 3/4", "3/4"),
        ("The answer is hard. It is 12 pens and 3 more.", "12"),
        ("First 3, then 4, at last -5", "-5"),
        ("no number here", ""),
        ("", ""),
    ],
)
def test_the_final_answer(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1,000", "1000.0", True), ("1/2", "0.5", True), (r"\frac{1}{2}", "0.5", True), ("50%", "50", True),
        ("$7", "7 dollars", True), ("7.", "7", True), ("-3", "3", False), ("3", "4", False), ("", "", False),
        ("x + 1", "x+1", True), ("x + 1", "x + 2", False), (r"\text{ }Monday", "monday", True), ("1/0", "1/0", True),
    ],
)  # fmt: skip
def test_the_same_answer(one, other, equal):
    assert same(one, other) is equal


def test_score_of_a_solution():
    item = {"reference": "He pays 3 * 4 = 12.\n#### 12"}
    assert score(item, "I think the answer is 12.00")
    assert not score(item, "12 apples and so 13")
    assert not score(item, "I do not know")


def test_every_real_solution_has_an_answer(shared_data):
    import gzip
    import json

    with gzip.open(shared_data / "gsm8k_messages.jsonl.gz", "rt") as lines:
        for line in lines:
            text = json.loads(line)["messages"][-1]["content"]
            assert same(extract(text), text.rsplit("The answer is", 1)[1].strip().rstrip(".")), text
