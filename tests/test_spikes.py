"""Spike skipping: the rule against NumPy, its window in the optimizer's state, and a resume in mid-window."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itune.skipped import Skipped
from itune.spikes import Window, judge, with_window
from itune.types import RunError


def empty(length):
    return Window(jnp.zeros(length), jnp.zeros(length), jnp.zeros((), jnp.int32))


def expected(values, length, sigmas):
    """Plain NumPy: above the mean of the last `length` finite numbers before it, once half of them are there."""
    seen, spikes = [], []
    for value in values:
        past = np.asarray(seen[-length:], np.float64)
        enough = len(past) >= max(2, length // 2)
        spikes.append(bool(enough and np.isfinite(value) and value - past.mean() > sigmas * past.std(ddof=1)))
        if np.isfinite(value):
            seen.append(value)
    return spikes


@pytest.mark.parametrize("which", ["loss", "norm"])
def test_rule_equals_numpy(which):
    rng = np.random.default_rng(0)
    values = np.exp(-np.arange(60) / 30) + 0.02 * rng.standard_normal(60)
    values[[3, 20, 40]] += 5  # the first comes before there is enough to compare with
    values[[30, 31]] = np.nan, np.inf
    window, found = empty(8), []
    one = jax.jit(judge)
    for value in values:
        loss, norm = (value, 1.0) if which == "loss" else (1.0, value)
        spike, window = one(window, jnp.float32(loss), jnp.float32(norm), 4.0)
        found.append(bool(spike))
    if which == "loss":  # a norm that never moves has no deviation: only a rise counts, and there is none
        assert int(window.seen) == 58
    assert found == expected(values, 8, 4.0)
    assert found[20] and found[40] and not found[3] and not any(found[30:32])


def test_a_lasting_change_of_level_is_soon_no_spike():
    window = empty(16)
    rng = np.random.default_rng(1)
    found = []
    for step in range(60):
        value = jnp.float32((1.0 if step < 30 else 5.0) + 0.01 * rng.standard_normal())
        spike, window = judge(window, value, jnp.float32(1), 3.0)
        found.append(bool(spike))
    assert found[30] and not any(found[32:])


def test_window_stands_beside_the_optimizers_state_and_an_update_leaves_it():
    optimizer = with_window(optax.adam(0.1), 8)
    params = {"w": jnp.ones(3)}
    state = optimizer.init(params)
    updates, after = optimizer.update({"w": jnp.ones(3)}, state, params)
    plain, inner = optax.adam(0.1).update({"w": jnp.ones(3)}, optax.adam(0.1).init(params), params)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), (updates, after.inner), (plain, inner)))
    assert after.window.losses_W.shape == (8,) and int(after.window.seen) == 0


def test_spikes_are_counted_but_only_numbers_that_are_not_finite_end_the_run():
    skipped = Skipped(limit=2)

    def count(step, finite=True, spike=False):
        values = {"loss": 1.0, "grad_norm": 2.0, "finite": finite, "spike": spike}
        line = skipped.count(step, values, lambda step: f"Batch {step}.", lambda: "kept")
        assert set(values) == {"loss", "grad_norm", "skipped"}
        return values["skipped"], line

    assert count(1) == (0, "")
    assert count(2, spike=True) == (
        1, "step 2: loss 1.0, gradient norm 2.0: a spike (train.skip_spikes); the update was skipped. Batch 2.")
    assert count(3, spike=True)[0] == 2 and count(4, finite=False)[0] == 3 and count(5)[0] == 3
    assert count(6, finite=False)[1].startswith("step 6: loss 1.0, gradient norm 2.0: not finite")
    with pytest.raises(RunError, match=r"\(2 in a row\)\. Batch 7\.; kept"):
        count(7, finite=False)
