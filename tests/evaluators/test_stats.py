import math

import numpy as np
import pytest
from scipy import optimize
from scipy import stats as scipy_stats

from itune.evaluators import stats


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (250, 500), (1, 1), (0, 500)])
def test_wilson_is_scipys(successes, n):
    judge = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert stats.wilson(successes, n) == pytest.approx((judge.low, judge.high), abs=1e-12)


def test_wilson_solves_its_equation():
    """The bounds are the rates whose score test just fails: |p - rate| = z sqrt(p (1 - p) / n)."""
    rate, n = 0.3, 40
    score = lambda p: abs(p - rate) - stats.Z95 * math.sqrt(p * (1 - p) / n)  # noqa: E731
    low, high = stats.wilson(rate * n, n)
    assert low == pytest.approx(optimize.brentq(score, 1e-9, rate), abs=1e-9)
    assert high == pytest.approx(optimize.brentq(score, rate, 1 - 1e-9), abs=1e-9)


def test_wilson_of_nothing_knows_nothing():
    assert stats.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 successes of 10"):
        stats.wilson(11, 10)


def test_wilson_covers():
    rng = np.random.default_rng(0)
    for rate in (0.05, 0.5, 0.79):
        hits = [low <= rate <= high for low, high in (stats.wilson(k, 100) for k in rng.binomial(100, rate, 2000))]
        assert 0.93 <= np.mean(hits) <= 0.975


def _tasks(rng, clusters, size, effect):
    """Paired outcomes whose tuned rate differs from task to task around base rate + effect."""
    base_rate = np.repeat(rng.uniform(0.1, 0.5, clusters), size)
    gain = np.repeat(np.clip(rng.normal(effect, 0.15, clusters), -0.1, 0.5), size)
    names = np.repeat(np.arange(clusters), size)
    return rng.random(clusters * size) < base_rate, rng.random(clusters * size) < base_rate + gain, names


@pytest.mark.parametrize("clusters", [8, 30])
def test_paired_interval_covers_where_the_naive_one_does_not(clusters):
    rng = np.random.default_rng(1)
    truth = np.clip(rng.normal(0.2, 0.15, 1_000_000), -0.1, 0.5).mean()
    covered, naive = [], []
    for trial in range(300):
        base, tuned, names = _tasks(rng, clusters, 25, 0.2)
        _, low, high = stats.paired_difference(base, tuned, names, seed=trial, resamples=400)
        covered.append(low <= truth <= high)
        naive_half = stats.Z95 * stats.standard_error(tuned.astype(float) - base, range(len(names)))
        naive.append(abs(tuned.mean() - base.mean() - truth) <= naive_half)
    assert 0.91 <= np.mean(covered) <= 0.985
    assert np.mean(naive) < 0.85


def test_paired_difference_of_unequal_clusters():
    difference, low, high = stats.paired_difference([0, 0, 0, 1], [1, 1, 1, 1], ["a", "a", "b", "c"])
    assert difference == 0.75
    assert -1 <= low <= difference <= high <= 1


def test_paired_difference_is_repeatable_and_keeps_order():
    rng = np.random.default_rng(2)
    base, tuned, names = _tasks(rng, 12, 10, 0.3)
    once = stats.paired_difference(base, tuned, names, seed=3)
    assert once == stats.paired_difference(base, tuned, names, seed=3)
    assert once[0] == pytest.approx(np.mean(tuned.astype(float) - base))


def test_no_spread_is_not_certainty():
    difference, low, high = stats.paired_difference([0.0] * 50, [0.0] * 50, range(50))
    assert difference == 0 and high == pytest.approx(3 / 50, rel=0.05) and low == -high
    assert stats.clustered_mean([1.0] * 20, range(20))[1] == pytest.approx(0.05 ** (1 / 20))
    assert stats.clustered_mean([1.0] * 20, ["one task"] * 20) == (1.0, 0.0, 1.0)


def test_standard_error_is_the_textbook_one_for_single_items():
    values = np.random.default_rng(4).random(200)
    assert stats.standard_error(values, range(200)) == pytest.approx(values.std(ddof=1) / math.sqrt(200))


def test_standard_error_matches_the_spread_over_clusters():
    rng = np.random.default_rng(5)
    means, errors = [], []
    for _ in range(800):
        base, tuned, names = _tasks(rng, 20, 15, 0.2)
        change = tuned.astype(float) - base
        means.append(change.mean())
        errors.append(stats.standard_error(change, names))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_minimum_detectable_difference():
    assert stats.minimum_detectable_difference(stats.paired_error(500, 0.3)) == pytest.approx(0.0686, abs=2e-4)
    rng, error = np.random.default_rng(6), 0.02
    truth = stats.minimum_detectable_difference(error)
    found = rng.normal(truth, error, 20_000) > stats.Z95 * error
    assert np.mean(found) == pytest.approx(0.8, abs=0.01)


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="2 base, 1 tuned"):
        stats.paired_difference([0, 1], [1], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        stats.clustered_mean([], [])


def test_interval_is_wilsons_for_right_and_wrong_and_a_bootstrap_for_shares():
    assert stats.interval([1, 0, 1, True]) == (0.75, *stats.wilson(3, 4))
    mean, low, high = stats.interval([0.2, 0.4, 0.9, 1.0])
    assert mean == pytest.approx(0.625) and 0 <= low < mean < high <= 1
    assert stats.interval([]) == (0.0, 0.0, 1.0)


def test_ratio_weighs_and_clusters():
    mean, low, high = stats.ratio([6.0, 1.0, 2.0], [2.0, 1.0, 1.0], ["a", "b", "b"])
    assert mean == 9 / 4 and low <= mean <= high
    assert stats.ratio([6.0, 1.0], [2.0, 1.0], ["a", "a"])[1:] == (-math.inf, math.inf)
    assert stats.ratio([1.0, 0.0], [1.0, 0.0], ["a", "b"], 0.0, 5.0) == (1.0, 0.0, 5.0)  # one cluster has weight


def test_ratio_covers_the_truth():
    rng, inside = np.random.default_rng(0), 0
    for trial in range(200):
        effects = rng.normal(2.0, 0.5, 40)
        values = np.repeat(effects, 3) + rng.normal(0, 0.3, 120)
        weights = rng.integers(1, 9, 120)
        _, low, high = stats.ratio(values * weights, weights, np.repeat(np.arange(40), 3).tolist(), seed=trial)
        inside += low <= 2.0 <= high
    assert 180 <= inside <= 198  # 95 % of 200, give or take


def test_smallest_shown():
    changed = [1.0] * 30 + [-1.0] * 10 + [0.0] * 160
    expected = stats.minimum_detectable_difference(stats.standard_error(changed, range(200)))
    assert stats.smallest_shown(changed, range(200)) == pytest.approx(expected) and 0.05 < expected < 0.2
    assert stats.smallest_shown([0.0] * 1000, range(1000)) < stats.smallest_shown([0.0] * 100, range(100)) < 0.06
    assert stats.smallest_shown([1.0], ["a"]) == 1.0
