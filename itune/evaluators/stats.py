"""Intervals for rates, differences and means: what an evaluation of n items can and cannot tell.

Every bound is two-sided at 95 %. Items of one task resemble each other, so that means and differences are resampled by
cluster (task), never by item.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Z95 = 1.959963984540054


def wilson(successes: float, n: int) -> tuple[float, float]:
    """The Wilson score interval of a rate (Wilson 1927). With n = 0 nothing is known: (0, 1)."""
    if n == 0:
        return 0.0, 1.0
    if not 0 <= successes <= n:
        raise ValueError(f"wilson: {successes} successes of {n} items; expected between 0 and {n}")
    rate, z2 = successes / n, Z95**2
    centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(rate * (1 - rate) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    low = 0.0 if successes == 0 else max(0.0, centre - half)  # the ends are exact, rounding would miss them
    return low, 1.0 if successes == n else min(1.0, centre + half)


def paired_difference(
    base_scores: Sequence[float],
    tuned_scores: Sequence[float],
    clusters: Sequence[Hashable],
    seed: int = 0,
    resamples: int = 2000,
) -> tuple[float, float, float]:
    """Mean of tuned - base over the same items, with the interval of a bootstrap over clusters.

    Scores lie in [0, 1], one per item, in the same order; `clusters` names each item's task. Returns
    (difference, low, high). Raises ValueError when the lengths differ or there is no item.
    """
    base, tuned = np.asarray(base_scores, np.float64), np.asarray(tuned_scores, np.float64)
    counts = len(base), len(tuned), len(clusters)
    if len(set(counts)) > 1:
        raise ValueError("paired scores: {} base, {} tuned, {} clusters; expected as many".format(*counts))
    return _clustered(tuned - base, clusters, -1.0, 1.0, seed, resamples)


def clustered_mean(
    scores: Sequence[float], clusters: Sequence[Hashable], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Mean of scores in [0, 1], with the interval of a bootstrap over clusters: (mean, low, high)."""
    return _clustered(np.asarray(scores, np.float64), clusters, 0.0, 1.0, seed, resamples)


def interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> tuple[float, float, float]:
    """(mean, low, high) of scores in [0, 1]: by Wilson where each is 0 or 1 and clusters is None, else bootstrap."""
    if len(values) == 0:
        return 0.0, 0.0, 1.0
    scores = np.asarray(values, np.float64)
    if clusters is None and np.isin(scores, (0.0, 1.0)).all():
        return float(scores.mean()), *wilson(float(scores.sum()), len(scores))
    return clustered_mean(values, range(len(scores)) if clusters is None else clusters)


def ratio(
    sums: Sequence[float], weights: Sequence[float], clusters: Sequence[Hashable], floor: float = -math.inf,
    ceiling: float = math.inf, seed: int = 0, resamples: int = 2000,
) -> tuple[float, float, float]:
    """sum(sums) / sum(weights), such as a loss a token, with the interval of a bootstrap over clusters.

    The value lies between `floor` and `ceiling`. One cluster tells nothing: the interval is all that is between them.
    """
    tops, bottoms = (_by_cluster(np.asarray(part, np.float64), clusters)[0] for part in (sums, weights))
    return _bootstrap(tops, bottoms, floor, ceiling, seed, resamples)


def smallest_shown(differences: Sequence[float], clusters: Sequence[Hashable], power: float = 0.8) -> float:
    """The smallest true difference that paired scores like these would have shown, at most 1 (all or nothing).

    Where no item changed sides, a share of up to 3/n of the tasks may still do so unseen.
    """
    number = len(set(clusters))
    error = standard_error(differences, clusters)
    if error < 1e-12:
        error = paired_error(number, min(1.0, 3 / number))
    return min(1.0, minimum_detectable_difference(error, power))


def standard_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float:
    """Standard error of a mean whose items come in clusters (linearised ratio of cluster sums; infinite for one)."""
    sums, counts = _by_cluster(np.asarray(values, np.float64), clusters)
    if len(sums) < 2:
        return math.inf
    residuals = sums - counts * (sums.sum() / counts.sum())
    return float(np.sqrt((residuals**2).sum() * len(sums) / (len(sums) - 1)) / counts.sum())


def minimum_detectable_difference(error: float, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided 5 % test with this standard error finds with this probability."""
    return (Z95 + NormalDist().inv_cdf(power)) * error


def paired_error(n: int, discordance: float = 0.3) -> float:
    """Expected standard error of a paired difference of rates when a share `discordance` of n items changes sides."""
    return math.sqrt(discordance / n)


def _by_cluster(values: Floats, clusters: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """Sum of the values and number of items of each cluster."""
    if len(values) == 0 or len(values) != len(clusters):
        raise ValueError(f"{len(values)} scores with {len(clusters)} clusters; expected as many, and at least one")
    index: dict[Hashable, int] = {}
    cluster_of_item = np.array([index.setdefault(cluster, len(index)) for cluster in clusters])
    counts, sums = np.bincount(cluster_of_item), np.bincount(cluster_of_item, weights=values)
    return sums.astype(np.float64), counts.astype(np.float64)


def _clustered(
    values: Floats, clusters: Sequence[Hashable], floor: float, ceiling: float, seed: int, resamples: int
) -> tuple[float, float, float]:
    return _bootstrap(*_by_cluster(values, clusters), floor, ceiling, seed, resamples)


def _bootstrap(
    sums: Floats, counts: Floats, floor: float, ceiling: float, seed: int, resamples: int
) -> tuple[float, float, float]:
    """Percentile bootstrap over clusters, its tails widened for few clusters (Hesterberg 2015, section 4.2).

    Where all clusters agree the bootstrap has no spread and would claim certainty. There the bound is that of zero
    events: with C clusters, a share up to 1 - 0.05**(1/C) of all tasks may be as far away as the scale allows.
    """
    from scipy.special import stdtrit  # jax requires scipy: no dependency of our own, and a slow import

    if not counts.sum():
        return 0.0, floor, ceiling
    sums, counts = sums[counts > 0], counts[counts > 0]
    mean, number = float(sums.sum() / counts.sum()), len(sums)
    if number == 1 or not math.isfinite(mean):
        return mean, floor, ceiling
    if np.ptp(sums / counts) < 1e-12 and math.isfinite(floor + ceiling):
        unseen = 1 - 0.05 ** (1 / number)
        return mean, mean - unseen * (mean - floor), mean + unseen * (ceiling - mean)
    rng, means = np.random.default_rng(seed), []
    for start in range(0, resamples, 250):  # 10,000 clusters at once would take gigabytes
        draws = rng.multinomial(number, np.full(number, 1 / number), size=min(250, resamples - start))
        means.append((draws @ sums) / (draws @ counts))
    t95 = float(stdtrit(number - 1, 0.975))
    tail = NormalDist().cdf(-math.sqrt(number / (number - 1)) * t95)
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return mean, max(floor, float(low)), min(ceiling, float(high))
