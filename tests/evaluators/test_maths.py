import pytest

from itune.evaluators.maths import extract, same, score


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("#### $1,080\n", "1,080"),
        (r"So \boxed{1} or rather $\boxed{\frac{3}{4}}$.", r"\frac{3}{4}"),
        (r"\boxed{a {b} c}", "a {b} c"),
        (r"open \boxed{3 and then 7", "7"),
        ("She has 5 apples. The answer is 10.", "10"),
        ("The answer is $1,234.50 a year, not 7.", "1,234.50"),
        ("Answer: 3/4", "3/4"),
        ("The answer is hard. It is 12 pens and 3 more.", "12"),
        ("First 3, then 4, at last -5", "-5"),
        ("#### Step 1: add\n9 + 9 = 18\nThe answer is 18.", "18"),
        ("#### 1. Add the two\n9 + 9 = 18", "18"),
        ("#### Step 1\nx\n#### Final answer\n\\boxed{18}", "18"),
        ("#### Final answer: 18", "18"),
        ("So\n#### **18**\n", "18"),
        ("#### 18 eggs at 2 each", "18"),
        ("#### Paris", "Paris"),
        ("#### 2x", "2x"),
        ("There are 10-5", "5"),
        ("The answer is \u22125.", "-5"),
        ("It costs 1 000", "1 000"),
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
        ("1 000", "1000", True), (r"1{,}000", "1000", True), ("\u22125", "-5", True), (r"1\frac{1}{2}", "3/2", True),
        ("1 1/2", "11/2", False), (r"5\,\text{cm}^2", "5", True), (r"x^{2}", "x^2", True), ("2 million", "2", False),
        (r"\text{Even}", "even", True),
    ],
)  # fmt: skip
def test_the_same_answer(one, other, equal):
    assert same(one, other) is equal


PAIRS = [  # of answers in boxes, none of two numbers that are equal
    (r"\text{(B)}", r"\text{(A)}"), (r"\mathrm{A}", r"\mathrm{B}"), (r"\mbox{even}", r"\mbox{odd}"), ("2x", "2y"),
    ("2x+y", "2"), ("2i", "2"), ("2 i", "2"), ("5!", "5"), ("3n^2", "3n"), (r"2\pi", "2"), ("(x+1)2", "2"),
    (r"\frac{x+1}{2}", r"x+\frac{1}{2}"), (r"\frac{11}{2}", r"1\frac{1}{2}"), (r"\sqrt{23}", r"\sqrt{2}3"),
    ("(3,141)", "3141"), ("x>2", "2"), ("(2", "2"), ("5:30", "5:30 PM"), ("110_5", "110"), (r"[2,\infty)", "2"),
    (r"\frac12", r"\frac{1}{2}"), (r"\frac1x", r"\frac{1}{x}"), ("5", "x=5"), ("5", "x = 5"), ("yes", "x=yes"),
    (r"2\sqrt3", r"2\sqrt{3}"), (r"\dfrac{x}{2}", r"\tfrac{x}{2}"), (r"\{1,2\}", r"\{1, 2\}"), (r"10\%", "10"),
    (r"\left(1,2\right)", "(1,2)"), (r"90^\circ", r"90^{\circ}"), (r"x\text{ cm}", "x"), (r"1,\!000", "1,000"),
]  # fmt: skip


def test_two_answers_are_equal_where_the_harness_has_them_equal():
    judge = pytest.importorskip("lm_eval.tasks.hendrycks_math.utils").is_equiv
    found = [(one, other, same(one, other)) for pair in PAIRS for one, other in (pair, pair[::-1])]
    assert found == [(one, other, judge(one, other)) for one, other, _ in found]
    assert {equal for *_, equal in found} == {True, False}


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
