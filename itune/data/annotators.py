"""Whose voices a data set holds: how many annotators or groups, how evenly, and whether they agree.

Coverage is the effective number of groups, exp(entropy) of their shares: 10 groups of which one wrote nearly everything
count as little more than 1. Agreement is Krippendorff's alpha (Krippendorff 2011, "Computing Krippendorff's
alpha-reliability"), overall, within each group, and across groups (cross-replication reliability, Wong, Paritosh, Aroyo
2021). Our own code: the packaged one is under the GPL.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from itune.data import words
from itune.types import Conversation, InputError

LEVELS = ("nominal", "ordinal", "interval")


def coverage(values: Sequence[Hashable | None]) -> dict[str, Any]:
    """How the rows spread over groups: `values` has each row's group, None or "" where there is none.

    Returns groups, effective (exp of the entropy, in groups), largest_share, rows without a group, and rows by group.
    """
    counts = collections.Counter(value for value in values if value not in (None, ""))
    total = sum(counts.values())
    entropy = -sum(count / total * math.log(count / total) for count in counts.values())
    return {
        "groups": len(counts),
        "effective": math.exp(entropy) if total else 0.0,
        "largest_share": max(counts.values()) / total if total else 0.0,
        "without": len(values) - total,
        "rows": {str(name): count for name, count in counts.most_common()},
    }


def alpha(units: Sequence[Sequence[Any]], level: str = "nominal") -> float:
    """Krippendorff's alpha of units, each the values that its annotators gave (missing ones left out).

    1 is agreement, 0 what chance gives, below 0 systematic disagreement; nan where nothing can be compared (no unit
    with two values, or one value throughout). `level`: nominal, ordinal or interval; the latter two need numbers.
    """
    pairable = [list(unit) for unit in units if len(unit) >= 2]
    values, index, difference = _scale(pairable, level)
    coincidence = np.zeros((len(values), len(values)))
    for unit in pairable:
        counts = np.bincount([index[value] for value in unit], minlength=len(values)).astype(float)
        coincidence += (np.outer(counts, counts) - np.diag(counts)) / (len(unit) - 1)
    totals = coincidence.sum(axis=1)
    distance = difference(totals)
    number = totals.sum()
    expected = (np.outer(totals, totals) * distance).sum() / (number * (number - 1)) if number > 1 else 0.0
    return 1 - (coincidence * distance).sum() / number / expected if expected > 0 else math.nan


def across(units: Sequence[tuple[Sequence[Any], Sequence[Any]]], level: str = "nominal") -> float:
    """Agreement between two groups: units of (values of one group, values of the other). 1 is agreement, 0 chance."""
    both = [(list(one), list(other)) for one, other in units if one and other]
    values, index, difference = _scale([one + other for one, other in both], level)
    observed, weight = np.zeros((len(values), len(values))), 0.0
    left, right = np.zeros(len(values)), np.zeros(len(values))
    for one, other in both:
        counts = [np.bincount([index[value] for value in side], minlength=len(values)) for side in (one, other)]
        share = counts[0].sum() + counts[1].sum()
        observed += share * np.outer(counts[0] / counts[0].sum(), counts[1] / counts[1].sum())
        left, right, weight = left + counts[0], right + counts[1], weight + share
    distance = difference(left + right)
    expected = (np.outer(left, right) * distance).sum() / max(1.0, left.sum() * right.sum())
    return 1 - (observed * distance).sum() / weight / expected if expected > 0 else math.nan


def _scale(units: list[list[Any]], level: str) -> tuple[list[Any], dict[Any, int], Callable[[np.ndarray], np.ndarray]]:
    """The distinct values in order, the place of each, and the squared difference of any two by their frequencies."""
    if level not in LEVELS:
        raise InputError(f"agreement: unknown level {level!r}; expected one of {', '.join(LEVELS)}")
    found = {value for unit in units for value in unit}
    if level != "nominal" and not all(isinstance(value, int | float) for value in found):
        odd = next(value for value in sorted(found, key=str) if not isinstance(value, int | float))
        raise InputError(f"agreement: level {level!r} needs numbers, found {odd!r}; use 'nominal' for labels")
    values = sorted(found, key=str) if level == "nominal" else sorted(found)

    def difference(totals: np.ndarray) -> np.ndarray:
        if level == "nominal":
            return 1.0 - np.eye(len(values))
        if level == "interval":
            numbers = np.array(values, float)
            return (numbers[:, None] - numbers[None, :]) ** 2
        ranks = np.cumsum(totals) - totals / 2  # the middle of each value's ranks
        return (ranks[:, None] - ranks[None, :]) ** 2

    return values, {value: place for place, value in enumerate(values)}, difference


def agreement(
    conversations: Sequence[Conversation], value: str, group: str = "", item: str = "", level: str = "nominal"
) -> dict[str, Any]:
    """Alpha of the metadata field `value` over rows of the same item: overall, within and across groups.

    `group` is the field of an annotator's group; `item` names the field that tells items apart, "" takes the prompt.
    Rows without a value are left out.
    """
    units: dict[str, dict[str, list[Any]]] = collections.defaultdict(lambda: collections.defaultdict(list))
    for row in conversations:
        if row.metadata.get(value) is not None:
            key = str(row.metadata.get(item)) if item else words.normalise(words.prompt_text(row))
            units[key][str(row.metadata.get(group, ""))].append(row.metadata[value])
    names = sorted({name for sides in units.values() for name in sides if name})
    whole = [[each for side in sides.values() for each in side] for sides in units.values()]
    result: dict[str, Any] = {
        "overall": alpha(whole, level),
        "items": len(units),
        "items_with_several": sum(len(unit) >= 2 for unit in whole),
    }
    if group:
        result["within"] = {name: alpha([_side(sides, name) for sides in units.values()], level) for name in names}
        result["across"] = {
            f"{one} | {other}": across([(_side(sides, one), _side(sides, other)) for sides in units.values()], level)
            for place, one in enumerate(names)
            for other in names[place + 1 :]
        }
    return result


def _side(sides: Mapping[str, list[Any]], name: str) -> list[Any]:
    return list(sides.get(name, ()))
