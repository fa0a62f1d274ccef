"""The newest and the best stay."""

from itune.checkpoint.retention import best_step, lower_is_better, steps_to_delete


def test_direction_follows_the_metric():
    assert lower_is_better("heldout_loss/loss") and lower_is_better("heldout_loss/perplexity")
    assert not lower_is_better("exact_match/accuracy")
    assert not lower_is_better("heldout_loss/accuracy")


def test_best_ignores_missing_and_non_finite():
    metrics = {1: {"a/loss": float("nan")}, 2: {}, 3: {"a/loss": 2.0}, 4: {"a/loss": 2.0}, 5: {"a/loss": 9.0}}
    assert best_step(metrics, "a/loss") == 3
    assert best_step(metrics, "a/accuracy") is None
    assert best_step({1: {"a": 0.5}, 2: {"a": 0.7}}, "a") == 2


def test_deletes_what_neither_rule_covers():
    metrics = {step: {"a/loss": float(abs(step - 2))} for step in range(6)}
    assert steps_to_delete(metrics, keep=2) == [0, 1, 2, 3]
    assert steps_to_delete(metrics, keep=2, keep_best="a/loss") == [0, 1, 3]
    assert steps_to_delete(metrics, keep=9) == []


def test_multiples_stay():
    assert steps_to_delete({step: {} for step in range(1, 9)}, keep=1, keep_every=3) == [1, 2, 4, 5, 7]
