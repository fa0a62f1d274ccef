"""Which checkpoints stay: the newest, and the best by a metric."""

from __future__ import annotations

import math
from collections.abc import Mapping

# a metric with one of these words in its name is better when it is lower
_LOWER = ("loss", "nll", "perplexity", "error", "bits")


def lower_is_better(metric: str) -> bool:
    return any(word in metric.rsplit("/", 1)[-1].lower() for word in _LOWER)


def best_step(metrics_by_step: Mapping[int, Mapping[str, float]], metric: str) -> int | None:
    """The step whose `metric` is best (the earliest of equals); None when no step has a finite one."""
    sign = 1.0 if lower_is_better(metric) else -1.0
    scored = [
        (sign * metrics[metric], step)
        for step, metrics in metrics_by_step.items()
        if metric in metrics and math.isfinite(metrics[metric])
    ]
    return min(scored)[1] if scored else None


def steps_to_delete(
    metrics_by_step: Mapping[int, Mapping[str, float]], keep: int, keep_best: str = "", keep_every: int = 0
) -> list[int]:
    """The steps that the newest `keep`, the best by `keep_best` and multiples of `keep_every` leave, oldest first."""
    steps = sorted(metrics_by_step)
    staying = set(steps[-keep:])
    if keep_best and (best := best_step(metrics_by_step, keep_best)) is not None:
        staying.add(best)
    if keep_every:
        staying |= {step for step in steps if step % keep_every == 0}
    return [step for step in steps if step not in staying]
