"""Which examples an epoch draws: each once, or as weights, counts, a cap, a temperature or a balance plan them."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from itune.data import balance
from itune.data.categories import CATEGORIES
from itune.data.store import ExampleStore
from itune.types import InputError

KEYS = ("mixture", "counts", "cap", "temperature", "balance", "max_repeats", "draws")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The keys of a data section that plan an epoch, as `configs/default.py` explains them. Falsy where none is set."""

    mixture: Mapping[str, float] = dataclasses.field(default_factory=dict)
    counts: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    cap: int = 0
    temperature: float = 0.0
    balance: Mapping[str, float] = dataclasses.field(default_factory=dict)
    max_repeats: float = 0.0
    draws: int = 0

    @classmethod
    def of(cls, given: Any) -> Mixture:
        """A Mixture of a data section, of source weights, or of nothing."""
        if isinstance(given, cls):
            return given
        if given is None or isinstance(given, Mapping):
            return cls(mixture=dict(given or {}))
        return cls(**{name: getattr(given, name) for name in KEYS})

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in KEYS)

    def set_keys(self) -> list[tuple[str, Any]]:
        """The keys that are set besides the weights, in order, for a fingerprint."""
        values = ((name, getattr(self, name)) for name in KEYS[1:] if getattr(self, name))
        return [(name, sorted(value.items()) if isinstance(value, Mapping) else value) for name, value in values]


def plan(store: ExampleStore, mixture: Mixture) -> tuple[list[Any], balance.Plan]:
    """(group of every example, draws of every group in one epoch). Groups are sources, or with a balance also
    categories. Raises InputError for names that are not there and for plans that cannot be met."""
    sources = [store.source_names[number] for number in store.sources.tolist()]
    sizes = dict(Counter(sources))
    _check_weights(mixture.mixture, sizes, mixture.counts)
    if not mixture.balance:
        made = balance.plan(
            sizes, weights=mixture.mixture or None, counts=mixture.counts or None, cap=mixture.cap,
            temperature=mixture.temperature or None, total=mixture.draws, max_repeats=mixture.max_repeats,
        )  # fmt: skip
        return sources, made
    beside = [f"data.{name}" for name in ("counts", "cap", "temperature") if getattr(mixture, name)]
    if beside:
        raise InputError(f"data.balance plans sources and categories together and cannot stand beside "
                         f"{', '.join(beside)}; expected one of them")
    for name in mixture.balance:
        if name not in CATEGORIES:
            near = difflib.get_close_matches(name, CATEGORIES, n=1, cutoff=0.4)
            hint = f" (nearest: {near[0]})" if near else ""
            raise InputError(f"data.balance: no category is called {name}{hint}; categories: {', '.join(CATEGORIES)}")
    groups = list(zip(sources, category_names(store)))
    made = balance.target_balance(dict(Counter(groups)), mixture.balance, sources=mixture.mixture or None,
                                  total=mixture.draws, max_repeats=mixture.max_repeats)  # fmt: skip
    return groups, made


def category_names(store: ExampleStore) -> list[str]:
    return [CATEGORIES[number] for number in store.categories.tolist()]  # -1, none decided, is the last one: unknown


def draws(store: ExampleStore, mixture: Mixture, seed: Sequence[int]) -> np.ndarray:
    """Example indices of one epoch, by group; within a group no example is drawn more than once more often
    than another. `seed` decides which ones are drawn once more."""
    if not mixture:
        return np.arange(len(store), dtype=np.int32)
    groups, made = plan(store, mixture)
    chosen = balance.pick(groups, made.draws, seed)
    if not len(chosen):
        raise InputError("data.mixture: the plan draws no example; expected at least one")
    return chosen


def realised(store: ExampleStore, chosen: np.ndarray) -> dict[str, Any]:
    """What an epoch comes to, by source and by category: rows, draws, shares in examples and supervised tokens."""
    categories = store.categories % len(CATEGORIES)  # -1, none decided, is the last one: unknown
    return {"by_source": balance.realised(store.sources, store.source_names, chosen, store.supervised),
            "by_category": balance.realised(categories, CATEGORIES, chosen, store.supervised)}  # fmt: skip


def planned_counts(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, int]:
    """Draws of each source in one epoch: shares in proportion to the weights, as many in all as there are examples.

    Raises InputError for an unknown or missing source name and for a weight that is negative or not a number.
    """
    _check_weights(weights, sizes, {})
    return dict(balance.plan(sizes, weights=weights).draws)


def _check_weights(weights: Mapping[str, Any], sizes: Mapping[str, int], counts: Mapping[str, Any]) -> None:
    for key, given in (("mixture", weights), ("counts", counts)):
        for name, value in given.items():
            if name not in sizes:
                near = difflib.get_close_matches(name, list(sizes), n=1, cutoff=0.4)
                hint = f" (nearest: {near[0]})" if near else ""
                raise InputError(f"data.{key}: no source is called {name}{hint}; "
                                 f"sources with examples: {', '.join(sizes)}")
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
                raise InputError(f"data.{key}.{name}: found {value!r}; expected a number of at least 0")
    missing = [name for name in sizes if name not in weights and name not in counts]
    if weights and missing:
        raise InputError(f"data.mixture: no weight for {', '.join(missing)}; "
                         "expected one for each source, 0 leaves it out")
    if weights and not sum(weights.values()) and not counts:
        raise InputError("data.mixture: every weight is 0; expected at least one above")
