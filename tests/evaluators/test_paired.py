"""Base against tuned: the numbers by hand, the parts, and what is left unsaid when nothing can be shown."""

import json

import numpy as np
import pytest

from itune import evaluators
from itune.evaluators import shown, stats
from itune.evaluators.paired import comparable, compare


def item(place, score, **more):
    return {"address": f"rows:{place}", "prompt": f"p{place}", "score": score,
            "category": "sea" if place % 2 else "sky", "cluster": f"task {place // 2}",
            "source": "a" if place < 6 else "b", "groups": {"voice": f"v{place % 3}"}, **more}  # fmt: skip


BASE = [item(place, place == 0) for place in range(12)]
TUNED = [item(place, place >= 4) for place in range(12)]


def test_numbers_by_hand():
    found = compare(BASE, TUNED)
    assert (found["n"], found["clusters"], found["wins"], found["losses"], found["ties"]) == (12, 6, 8, 1, 3)
    assert (found["base"], found["tuned"], found["difference"]) == (1 / 12, 8 / 12, pytest.approx(7 / 12))
    clusters = [one["cluster"] for one in TUNED]
    low, high = stats.paired_difference([b["score"] for b in BASE], [t["score"] for t in TUNED], clusters)[1:]
    assert (found["difference_low"], found["difference_high"]) == (low, high) and found["sure"] is (low > 0)
    differences = [float(t["score"]) - float(b["score"]) for b, t in zip(BASE, TUNED)]
    expected = stats.minimum_detectable_difference(stats.standard_error(differences, clusters))
    assert found["detectable"] == pytest.approx(expected)


def test_parts_by_category_source_and_group():
    found = compare(BASE, TUNED)
    assert sorted(found["categories"]) == ["sea", "sky"] and sorted(found["sources"]) == ["a", "b"]
    assert sorted(found["groups"]["voice"]) == ["v0", "v1", "v2"]
    assert found["categories"]["sky"]["losses"] == 1 and found["categories"]["sea"]["losses"] == 0
    assert sum(part["n"] for part in found["sources"].values()) == 12
    assert found["sources"]["b"]["difference"] == 1.0


def test_items_are_matched_and_the_rest_is_counted():
    found = compare(BASE[:10], list(reversed(TUNED[2:])))
    assert found["n"] == 8 and found["unmatched"] == 4
    assert compare([], TUNED) == {"n": 0, "unmatched": 12}


def test_no_change_shows_what_could_have_been_missed():
    same = compare(BASE, BASE)
    assert same["difference"] == 0 and not same["sure"]
    assert 0.5 < same["detectable"] <= 1  # six tasks can show little
    many = [item(place, 0, cluster=str(place)) for place in range(500)]
    assert 0.005 < compare(many, many)["detectable"] < 0.02
    assert "no difference shown (only one of" in shown.paired_line(same)


def test_losses_are_token_weighted():
    base = [{**item(0, 0), "loss": 3.0, "weight": 1.0}, {**item(1, 0), "loss": 1.0, "weight": 3.0}]
    tuned = [{**one, "loss": one["loss"] / 2} for one in base]
    for one in base + tuned:
        del one["score"]
    found = compare(base, tuned)
    assert (found["base"], found["tuned"], found["difference"]) == (1.5, 0.75, -0.75)
    assert found["wins"] == 2 and "detectable" not in found
    assert found["difference_low"] is None or found["difference_low"] <= -0.75
    json.loads(json.dumps(found, allow_nan=False))
    of_numpy = [{**one, "loss": np.float64(one["loss"])} for one in tuned]  # as the evaluator gives them
    assert json.loads(json.dumps(compare(base, of_numpy))) == json.loads(json.dumps(found))


def test_the_file_beside_the_summary(tmp_path):
    for step, items in (("0", BASE), ("9", TUNED)):
        evaluators.write_results(tmp_path / step, "generation", {"n": 12}, items)
    found = evaluators.write_comparison(tmp_path / "0", tmp_path / "9", "generation", TUNED)
    assert evaluators.read_json(tmp_path / "9" / "paired.json") == {"generation": json.loads(json.dumps(found))}
    assert evaluators.write_comparison(tmp_path / "none", tmp_path / "9", "generation", TUNED) is None
    assert not comparable([{"address": "a"}]) and not comparable([])


def test_numbers_of_numpy_are_numbers_on_disk(tmp_path):
    numbers = {"count": np.int64(3), "rate": np.float32(0.5), "sure": np.bool_(True), "path": tmp_path}
    evaluators.write_results(tmp_path, "mine", numbers, [numbers])
    expected = {"count": 3, "rate": 0.5, "sure": True, "path": str(tmp_path)}
    assert evaluators.read_json(tmp_path / "summary.json") == {"mine": expected}
    assert evaluators.read_items(tmp_path / "mine.jsonl") == [expected]


@pytest.mark.parametrize(
    ("there", "here", "why"),
    [
        ({"score_by": "exact"}, {"score_by": "maths"}, "score is exact there and maths here"),
        ({"max_new_tokens": 64}, {"max_new_tokens": 256}, "eval.max_new_tokens is 64 there and 256 here"),
        ({"gsm8k": {"score_by": "a"}}, {"gsm8k": {"score_by": "b"}}, "gsm8k: score is a there and b here"),
    ],
)
def test_other_settings_are_not_compared(tmp_path, there, here, why):
    for step, summary, items in (("0", there, BASE), ("9", here, TUNED)):
        evaluators.write_results(tmp_path / step, "generation", summary, items)
    found = evaluators.write_comparison(tmp_path / "0", tmp_path / "9", "generation", TUNED)
    assert found == evaluators.read_json(tmp_path / "9" / "paired.json")["generation"] == {"n": 0, "refused": why}
    assert list(shown.paired_lines(found, "paired generation")) == [f"paired generation: not compared: {why}"]
    evaluators.write_results(tmp_path / "0", "generation", {}, BASE)  # of before settings were recorded
    assert evaluators.write_comparison(tmp_path / "0", tmp_path / "9", "generation", TUNED)["n"] == 12


def test_no_rate_stands_alone():
    summary = {"n": 600, "score": 0.5, "low": 0.4, "high": 0.6, "exact": 0.25, "exact_low": 0.2, "exact_high": 0.3}
    assert shown.brief(summary) == "score 0.5 (0.4 to 0.6), exact 0.25 (0.2 to 0.3), n 600"
    assert list(shown.lines({"a": summary}, "x")) == ["x/a/n  600", "x/a/score  0.5 (0.4 to 0.6)",
                                                      "x/a/exact  0.25 (0.2 to 0.3)"]  # fmt: skip


def test_of_a_long_breakdown_the_largest_parts_are_shown():
    parts = {f"task-{number}": {"n": number, "score": 0.5, "low": 0.4, "high": 0.6} for number in range(40)}
    said = list(shown.lines({"n": 780, "categories": parts, "groups": {"kind": {"a": {"n": 3}}}}, "x"))
    assert said[:2] == ["x/n  780", "x/categories/task-28  score 0.5 (0.4 to 0.6), n 28"]
    assert said[-2:] == ["x/categories: 28 smaller ones are in the files and in `itune report`", "x/groups/kind/a  n 3"]
    assert len(said) == 1 + 12 + 1 + 1
