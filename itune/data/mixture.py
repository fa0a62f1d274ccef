"""How often each source is drawn in an epoch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import numpy as np

from itune.types import InputError


def planned_counts(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Draws of each source in one epoch: shares in proportion to the weights, as many in all as there are examples.

    Rounded by largest remainder, so that the counts sum to the number of examples in sources of positive weight. Raises
    InputError for an unknown or missing source name and for a weight that is negative or not a number.
    """
    for name in weights:
        if name not in sizes:
            near = difflib.get_close_matches(name, list(sizes), n=1, cutoff=0.4)
            hint = f" (nearest: {near[0]})" if near else ""
            raise InputError(f"data.mixture: no source is called {name}{hint}; "
                             f"sources with examples: {', '.join(sizes)}")
    missing = [name for name in sizes if name not in weights]
    if missing:
        raise InputError(f"data.mixture: no weight for {', '.join(missing)}; "
                         "expected one for each source, 0 leaves it out")
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise InputError(f"data.mixture.{name}: found {weight!r}; expected a number of at least 0")
    total = float(sum(weights.values()))
    if total == 0:
        raise InputError("data.mixture: every weight is 0; expected at least one above")
    budget = sum(size for name, size in sizes.items() if weights[name] > 0)
    exact = {name: budget * weights[name] / total for name in sizes}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(sizes, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: budget - sum(counts.values())]:
        counts[name] += 1
    return counts


def draws(sources: np.ndarray, source_names: Sequence[str], weights: Mapping[str, float],
          rng: np.random.Generator) -> np.ndarray:  # fmt: skip
    """Example indices (int64) of one epoch. Without weights each once; else each source's examples in shuffled rounds,
    so that within a source no example is drawn more than once more often than another."""
    if not weights:
        return np.arange(len(sources))
    members = {name: np.flatnonzero(sources == number) for number, name in enumerate(source_names)}
    counts = planned_counts({name: len(found) for name, found in members.items()}, weights)
    chosen = []
    for name, found in members.items():
        rounds = [rng.permutation(found) for _ in range(-(-counts[name] // len(found)))]
        chosen += [np.concatenate(rounds)[: counts[name]]] if rounds else []
    return np.concatenate(chosen)
