"""Early stopping is a pure function of the evaluations so far: what stops, what does not, and what is refused."""

import json
import math

import pytest

from itune.config import from_dict
from itune.judge import Judge, check_patience
from itune.types import InputError
from itune.writers import write_atomically


def judge(tmp_path, values, metric="heldout_loss/loss", **settings):
    name, _, number = metric.partition("/")
    config = from_dict({"evaluators": [name], "eval": {"every": 10, "metric": metric, **settings}})
    found = Judge(config, tmp_path)
    for place, value in enumerate(values):
        found.enter(10 * place, name, {number: value})
    return found


@pytest.mark.parametrize(
    ("values", "settings", "stops"),
    [
        ([4.0, 3.0, 2.0], {"patience": 1}, False),
        ([4.0, 3.0, 3.0], {"patience": 1}, True),
        ([4.0, 3.0, 3.5, 2.9], {"patience": 2}, False),
        ([4.0, 3.0, 3.5, 3.1], {"patience": 2}, True),
        ([4.0, 3.0, 3.5, 3.6], {"patience": 0}, False),
        ([4.0, 3.0, 2.95], {"patience": 1, "min_delta": 0.1}, True),
        ([4.0, 3.0, 2.85], {"patience": 1, "min_delta": 0.1}, False),
        ([math.nan], {"patience": 1}, True),
        ([math.nan, 3.0], {"patience": 2}, False),
        ([4.0, math.nan, 3.0], {"patience": 2}, False),
        ([0.1, 0.2, 0.15], {"patience": 1, "metric": "generation/score"}, True),
        ([0.1, 0.2, 0.25], {"patience": 1, "metric": "generation/score"}, False),
    ],
)
def test_when_it_stops(tmp_path, values, settings, stops):
    metric = settings.pop("metric", "heldout_loss/loss")
    assert bool(judge(tmp_path, values, metric, **settings).stalled()) is stops


def test_the_reason_names_the_best(tmp_path):
    reason = judge(tmp_path, [4.0, 3.0, 3.5, 3.1], patience=2).stalled()
    assert reason.startswith("heldout_loss/loss has not improved for 2 evaluations; its best is 3 at step 10 ")


def test_a_resumed_run_decides_alike_and_ignores_later_evaluations(tmp_path):
    for step, loss in ((0, 4.0), (10, 3.0), (20, 3.5), (30, 1.0)):
        (tmp_path / "eval" / str(step)).mkdir(parents=True)
        (tmp_path / "eval" / str(step) / "summary.json").write_text(json.dumps({"heldout_loss": {"loss": loss}}))
    resumed = judge(tmp_path, [], patience=1)
    resumed.resume(20, print)
    assert resumed.stalled() == judge(tmp_path, [4.0, 3.0, 3.5], patience=1).stalled() != ""
    assert resumed.waiting(20) == [] and resumed.waiting(30) == ["heldout_loss"]


@pytest.mark.parametrize("text", ["", '{"heldout_loss": {"lo', "[]", '{"heldout_loss": 3}'])
def test_a_damaged_evaluation_counts_as_absent_and_is_kept_aside(tmp_path, text):
    lines = []
    for step, content in ((0, text), (10, '{"heldout_loss": {"loss": 1.0}}')):
        write_atomically(tmp_path / "eval" / str(step) / "summary.json", content)
    resumed = judge(tmp_path, [])
    resumed.resume(10, lines.append)
    assert resumed.results == {0: {}, 10: {"heldout_loss": {"loss": 1.0}}}
    assert len(lines) == 1 and "eval/0/summary.json: is damaged" in lines[0]
    assert (tmp_path / "eval" / "0" / "damaged-summary.json").read_text() == text
    assert not (tmp_path / "eval" / "0" / "summary.json").exists()


def test_an_evaluator_that_has_not_run_yet_counts_for_nothing(tmp_path):
    found = judge(tmp_path, [4.0, 3.0], patience=1)
    found.enter(20, "generation", {"score": 0.0})
    assert found.stalled() == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "eval.patience=2 needs evaluations during training"),
        ({"metric": "loss"}, r"'loss' is of no evaluator.*EVALUATOR/NUMBER"),
        ({"metric": "generation/score"}, "with one of heldout_loss"),
    ],
)
def test_patience_that_cannot_act_is_refused(settings, message):
    with pytest.raises(InputError, match=message):
        check_patience(from_dict({"eval": {"patience": 2, "every": 5, **settings}}))


def test_a_number_that_is_not_there_names_the_nearest(tmp_path):
    found = judge(tmp_path, [4.0], patience=1)
    found.config = from_dict({"eval": {"every": 10, "patience": 1, "metric": "heldout_loss/los"}})
    with pytest.raises(InputError, match=r"gives no 'heldout_loss/los'; did you mean heldout_loss/loss"):
        found.stalled()
