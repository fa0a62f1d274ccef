"""Categories, mixture plans by hand-computed numbers, target balance, and agreement against published values."""

import collections
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.data import annotators, balance, categories
from itune.types import Address, Conversation, InputError, Message


def row(prompt, source="s", **metadata):
    return Conversation((Message("user", prompt), Message("assistant", "Yes.")), Address(source), metadata)


def test_plan_without_settings_takes_every_row_once():
    made = balance.plan({"a": 70, "b": 30})
    assert made.draws == {"a": 70, "b": 30} and made.repeats() == {"a": 1.0, "b": 1.0}


def test_plan_by_weights_cap_and_temperature():
    assert balance.plan({"a": 70, "b": 30}, weights={"a": 1, "b": 1}).draws == {"a": 50, "b": 50}
    assert balance.plan({"a": 70, "b": 30}, weights={"b": 1}).draws == {"a": 0, "b": 30}
    by_size = balance.plan({"a": 70, "b": 30}, weights={"a": 3, "b": 7}, temperature=1.0, total=84)
    assert by_size.draws == {"a": 42, "b": 42}
    assert balance.plan({"a": 9000, "b": 1000}, cap=3000, total=400).draws == {"a": 300, "b": 100}
    assert balance.plan({"a": 900, "b": 100}, temperature=2.0, total=400).draws == {"a": 300, "b": 100}
    assert balance.plan({"a": 900, "b": 100}, temperature=1e9, total=10).draws == {"a": 5, "b": 5}
    assert balance.plan({"a": 10, "b": 10, "c": 10}, total=10).draws == {"a": 4, "b": 3, "c": 3}  # largest remainder


def test_plan_by_counts():
    made = balance.plan({"a": 100, "b": 50, "c": 10}, counts={"a": 20, "b": 0.5, "c": 2.0})
    assert made.draws == {"a": 20, "b": 25, "c": 20} and made.total == 65
    assert balance.plan({"a": 100, "b": 50}, counts={"a": 20}, total=60).draws == {"a": 20, "b": 40}


def test_what_a_limited_group_cannot_give_goes_to_the_others():
    made = balance.plan({"a": 10, "b": 500, "c": 500}, weights={"a": 2, "b": 1, "c": 1}, total=400, max_repeats=4)
    assert made.draws == {"a": 40, "b": 180, "c": 180} and made.limited == ("a",)
    with pytest.raises(InputError, match="400 draws asked for, but max_repeats allows 20"):
        balance.plan({"a": 10}, total=400, max_repeats=2)


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        ({"a": 3, "b": 3}, {"total": 8, "max_repeats": 1.5}),
        ({"a": 3, "b": 100}, {"weights": {"a": 1, "b": 1}, "max_repeats": 1.5}),
        ({"a": 100, "b": 7}, {"weights": {"a": 1, "b": 9}, "total": 100, "max_repeats": 1.9}),
        ({"a": 100, "b": 50}, {"weights": {"a": 1, "b": 9}, "total": 80, "max_repeats": 0.58}),  # 0.58 x 50 < 29
    ],
)
def test_no_group_is_drawn_more_often_than_max_repeats(rows, settings):
    made = balance.plan(rows, **settings)
    assert made.total == settings.get("total", sum(rows.values()))
    assert max(made.repeats().values()) <= settings["max_repeats"], made
    cells = {(name, name): count for name, count in rows.items()}
    shares = settings.get("weights", dict.fromkeys(rows, 1))
    balanced = balance.target_balance(cells, shares, total=made.total, max_repeats=settings["max_repeats"])
    assert balanced.total == made.total and max(balanced.repeats().values()) <= settings["max_repeats"]


def test_half_a_draw_is_none():
    with pytest.raises(InputError, match="9 draws asked for, but max_repeats allows 8"):
        balance.plan({"a": 3, "b": 3}, total=9, max_repeats=1.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": {"wikki": 1}}, "nothing is called 'wikki'; did you mean 'wiki'"),
        ({"weights": {"wiki": -1}}, "wiki has -1"),
        ({"weights": {"wiki": 0}}, "every weight is 0"),
        ({"temperature": 0}, "expected above 0"),
        ({"counts": {"wiki": 9}, "total": 5}, "fixed counts are 9 rows, more than the total of 5"),
        ({"total": 5, "weights": {"empty": 1}}, "every weight is 0 or its group empty"),
        ({"counts": {"empty": 3}}, "empty has no rows"),
        ({"counts": {"wiki": 1e300}}, "wiki would be drawn more than 2147483647 times"),
        ({"counts": {"wiki": 1e308}}, "wiki would be drawn more than"),  # ten times that is no number
        ({"counts": {"wiki": 10**400}}, "wiki would be drawn more than"),
        ({"temperature": 0.001}, r"10 rows \*\* \(1 / temperature\).*expected .*temperature above 0\.0033"),
        ({"temperature": 1e-320}, "is no number"),
        ({"weights": {"wiki": 1e308, "empty": 1e308}, "temperature": 0.5}, "expected a smaller weight"),
    ],
)
def test_bad_plans_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        balance.plan({"wiki": 10, "empty": 0}, **settings)


def test_target_balance_meets_both_margins():
    cells = {("a", "creative"): 100, ("a", "factual"): 900, ("b", "creative"): 300, ("b", "factual"): 100}
    made = balance.target_balance(cells, {"creative": 1, "factual": 1}, total=1000)
    by_category = collections.Counter()
    for (_, category), count in made.draws.items():
        by_category[category] += count
    assert by_category == {"creative": 500, "factual": 500}
    assert made.draws[("a", "creative")] == 125 and made.draws[("b", "creative")] == 375  # natural proportions inside
    both = balance.target_balance(cells, {"creative": 0.6, "factual": 0.4}, sources={"a": 0.7, "b": 0.3}, total=1000)
    sums = collections.Counter()
    for (source, category), count in both.draws.items():
        sums[source] += count
        sums[category] += count
    wanted = {"a": 700, "b": 300, "creative": 600, "factual": 400}
    assert all(abs(sums[name] - want) <= 2 for name, want in wanted.items())


def test_targets_that_cannot_hold_are_refused():
    cells = {("a", "creative"): 10, ("b", "factual"): 10}
    with pytest.raises(InputError, match="no rows for coding"):
        balance.target_balance(cells, {"creative": 1, "coding": 1})
    with pytest.raises(InputError, match="category creative can reach 80% at these source shares"):
        balance.target_balance(cells, {"creative": 1, "factual": 1}, sources={"a": 0.8, "b": 0.2})


def test_pick_draws_evenly_and_repeatably():
    groups = ["a"] * 5 + ["b"] * 3
    chosen = balance.pick(groups, {"a": 12, "b": 2}, seed=4)
    counts = np.bincount(chosen, minlength=8)
    assert sorted(counts[:5]) == [2, 2, 2, 3, 3] and sorted(counts[5:]) == [0, 1, 1]
    assert (chosen == balance.pick(groups, {"b": 2, "a": 12}, seed=4)).all()
    assert any((chosen != balance.pick(groups, {"a": 12, "b": 2}, seed=other)).any() for other in range(5))
    told = balance.realised(np.asarray([g == "b" for g in groups], int), ("a", "b"), chosen, [10] * 5 + [40] * 3)
    assert told["draws"] == 14 and told["groups"]["a"]["share_of_examples"] == pytest.approx(12 / 14)
    assert told["groups"]["a"]["share_of_tokens"] == pytest.approx(120 / 200)
    assert told["groups"]["a"]["most_repeats"] == 3 and told["groups"]["b"]["repeats"] == pytest.approx(2 / 3)
    entropy = -(12 / 14 * math.log(12 / 14) + 2 / 14 * math.log(2 / 14))
    assert told["effective_groups"] == pytest.approx(math.exp(entropy))


@pytest.mark.parametrize(
    ("prompt", "category"),
    [
        ("Write a short poem about winter.", "creative"),
        ("Can you please suggest names for a cat?", "creative"),
        ("What is the capital of Peru?", "factual"),
        ("Explain why the sky is blue.", "factual"),
        ("If Tom has 3 apples and buys 4, how many apples does he have in total?", "analytical"),
        ("Classify the sentiment of this review as positive or negative: I loved it.", "analytical"),
        ("Write a Python function that reverses a list.", "coding"),
        ("```\nint main() {}\n```\nWhat is wrong here?", "coding"),
        ("Does this post contain hate speech?", "safety"),
        ("I feel so lonely today.", "conversation"),
        ("zzz", "unknown"),
    ],
)
def test_categories_by_rule(prompt, category):
    assert categories.from_prompt(prompt) == category


@pytest.mark.parametrize("name", ["CODING", "SAFETY", "TALK"])
@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_every_match_of_a_rule_holds_what_the_rule_needs(name, data):
    """The rule is not searched for where none of these stands."""
    anywhere, needs = getattr(categories, f"_{name}"), getattr(categories, f"_{name}_NEEDS").split("|")
    found = data.draw(st.from_regex(re.compile(anywhere, re.ASCII), fullmatch=True))
    assert any(need in found for need in needs), found


def test_labels_come_first_then_sources_then_rules():
    rows = [row("Write a poem.", category="Math"), row("Write a poem.", "gsm"), row("Write a poem."), row("zzz")]
    found = categories.categorise(rows, source_defaults={"gsm": "analytical"})
    assert [tuple(each) for each in found] == [
        ("analytical", "label"), ("analytical", "source"), ("creative", "rule"), ("unknown", "unknown"),
    ]  # fmt: skip
    expected = {"gsm": {"analytical": 1}, "s": {"analytical": 1, "creative": 1, "unknown": 1}}
    assert categories.table(found, rows) == expected
    with pytest.raises(InputError, match="has default 'maths'"):
        categories.categorise(rows, source_defaults={"gsm": "maths"})
    assert [categories.from_label(label) for label in ("Coding & Debugging", "creative_writing", "open-qa", "?")] == [
        "coding", "creative", "factual", "",
    ]  # fmt: skip


def test_categories_of_real_instructions(real_rows):
    maths = [categories.from_prompt(each.messages[0].content) for each in real_rows["gsm8k_messages"][:1000]]
    assert maths.count("analytical") >= 800
    mixed = [categories.from_prompt(each.messages[0].content) for each in real_rows["seed_tasks"]]
    assert mixed.count("unknown") <= 9 and len(set(mixed)) >= 6


def test_coverage_is_the_effective_number_of_groups():
    assert annotators.coverage(["a", "b", "c", "d"] * 5)["effective"] == pytest.approx(4.0)
    uneven = annotators.coverage(["a"] * 97 + ["b", "c", "d", None, ""])
    assert uneven["groups"] == 4 and uneven["effective"] < 1.2 and uneven["without"] == 2
    assert annotators.coverage([])["effective"] == 0.0


# Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section E: 4 observers, 12 units
OBSERVERS = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 ."]
UNITS = [[int(value) for value in unit if value != "."] for unit in zip(*(line.split() for line in OBSERVERS))]


@pytest.mark.parametrize(("level", "value"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_alpha_equals_the_published_example(level, value):
    assert annotators.alpha(UNITS, level) == pytest.approx(value, abs=5e-4)


def test_alpha_at_its_ends():
    assert annotators.alpha([["a", "a"], ["b", "b", "b"]]) == pytest.approx(1.0)
    assert annotators.alpha([["a", "b"], ["b", "a"]]) < 0
    assert math.isnan(annotators.alpha([["a", "a"], ["a", "a"]])) and math.isnan(annotators.alpha([["a"]]))
    rng = np.random.default_rng(0)
    assert abs(annotators.alpha([[int(v) for v in rng.integers(0, 3, 4)] for _ in range(3000)])) < 0.03
    with pytest.raises(InputError, match="needs numbers, found 'a'"):
        annotators.alpha([["a", "b"]], "interval")


def test_agreement_within_and_across_groups():
    def rated(item, value, group):
        return row(item, rating=value, group=group)

    rng = np.random.default_rng(1)
    truth = [int(value) for value in rng.integers(0, 2, 200)]
    rows = [rated(f"item {i}", truth[i], "x") for i in range(200) for _ in range(2)]
    rows += [rated(f"item {i}", 1 - truth[i], "y") for i in range(200) for _ in range(2)]
    rows += [rated(f"item {i}", int(rng.integers(0, 2)), "z") for i in range(200) for _ in range(2)]
    told = annotators.agreement(rows, "rating", "group")
    assert told["items"] == told["items_with_several"] == 200
    assert told["within"]["x"] == told["within"]["y"] == pytest.approx(1.0) and abs(told["within"]["z"]) < 0.2
    assert told["across"]["x | y"] == pytest.approx(-1.0, abs=0.05) and abs(told["across"]["x | z"]) < 0.2
    assert told["overall"] < 0.2
