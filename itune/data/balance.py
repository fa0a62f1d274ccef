"""How often each group of rows is drawn: by weights, counts, caps, temperature, and a target balance by category.

Pure functions from numbers to numbers. A group is a source, a category or a pair of both. Plans are rounded by largest
remainder, so that draws add up exactly, and which rows are drawn depends on seed and group name only.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import zlib
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from itune.types import InputError

MOST = 2**31 - 1  # draws of a group


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows to draw from each group, of so many available. `limited` names the groups held back by max_repeats."""

    draws: Mapping[Any, int]
    available: Mapping[Any, int]
    limited: tuple[Any, ...] = ()

    @property
    def total(self) -> int:
        return sum(self.draws.values())

    def repeats(self) -> dict[Any, float]:
        """Passes over each group: draws over rows."""
        return {name: count / self.available[name] for name, count in self.draws.items() if self.available[name]}


def plan(
    available: Mapping[str, int],
    *,
    weights: Mapping[str, float] | None = None,
    counts: Mapping[str, int | float] | None = None,
    cap: int = 0,
    temperature: float | None = None,
    total: int = 0,
    max_repeats: float = 0.0,
) -> Plan:
    """Draws by group. With nothing set, every row once; `cap` counts no more than so many rows of a group.

    `weights` are shares of the mixture, whatever the sizes, 0 for a group without one. `temperature` makes sizes count
    again: shares go by weight * min(rows, cap) ** (1 / temperature), as T5 mixes by examples (1 is proportional to
    size, large is even). `counts` fixes groups instead: an int is a number of rows, a float a multiple of the group
    (0.5 half of it, 2.0 twice). `total` is the number of draws over all groups; 0 takes as many as there are (capped)
    rows. With `max_repeats`, no group is drawn more than so many times over; what it cannot give goes to the others.
    Raises InputError for unknown groups, negative numbers, and a total that cannot be reached.
    """
    _check(available, weights or {}, "weights")
    _check(available, counts or {}, "counts")
    if temperature is not None and temperature <= 0:
        raise InputError(f"mixture: temperature {temperature}; expected above 0 (1 is proportional, large is even)")
    capped = {name: min(rows, cap) if cap else rows for name, rows in available.items()}
    fixed = {name: _fixed(name, value, available[name]) for name, value in (counts or {}).items()}
    free = [name for name in available if name not in fixed]
    rate = {name: (weights or {}).get(name, 0.0 if weights else 1.0) for name in free}
    power = 1 / temperature if temperature is not None else 0.0 if weights else 1.0
    mass = _mass(rate, capped, power)
    if weights and free and not any(mass.values()):
        raise InputError("mixture: every weight is 0 or its group empty; expected at least one above 0")
    wanted = total - sum(fixed.values()) if total else sum(capped[name] for name in free if mass[name] > 0)
    if wanted < 0:
        raise InputError(f"mixture: the fixed counts are {sum(fixed.values())} rows, more than the total of {total}")
    limits = _limits({name: available[name] for name in free}, max_repeats)
    shares, limited = _fill(mass, limits, wanted, "mixture")
    return Plan(_rounded(shares, wanted) | fixed, dict(available), limited)


def _mass(rate: Mapping[str, float], rows: Mapping[str, int], power: float) -> dict[str, float]:
    """What each group weighs before its limits: rate x rows ** power."""
    try:
        mass = {name: rate[name] * rows[name] ** power if rows[name] else 0.0 for name in rate}
        if math.isfinite(sum(mass.values())):
            return mass
    except OverflowError:
        pass
    most = max(rows[name] for name in rate)
    raise InputError(f"mixture: {most} rows ** (1 / temperature) x weight is no number; expected a smaller weight, or "
                     f"a temperature above {math.log(max(most, 2)) / 700:.2g}")


def _limits(rows: Mapping[Any, int], max_repeats: float) -> dict[Any, float]:
    """The most draws of each group, whole: half a draw more would be made by rounding."""
    if not max_repeats:
        return dict.fromkeys(rows, math.inf)
    return {name: float(np.floor(max_repeats * count + 1e-9)) for name, count in rows.items()}


def _fixed(name: str, value: int | float, rows: int) -> int:
    exact = value if isinstance(value, int) else value * rows
    if exact > MOST:
        raise InputError(f"mixture counts: {name} would be drawn more than {MOST} times, the most there may be (an int "
                         "is a number of rows, a float a multiple of the group)")
    drawn = round(exact)
    if drawn and not rows:
        raise InputError(f"mixture: {name} has no rows, and {value} of it are asked for")
    return drawn


def target_balance(
    cells: Mapping[tuple[str, str], int],
    categories: Mapping[str, float],
    *,
    sources: Mapping[str, float] | None = None,
    total: int = 0,
    max_repeats: float = 0.0,
) -> Plan:
    """Draws for each (source, category) so that categories, and sources where given, have their target shares.

    `cells` has the rows of each pair. Shares are made to sum to 1; categories that are not named are left out. Within
    the targets rows keep their natural proportions (iterative proportional fitting, Deming and Stephan 1940). Raises
    InputError for a category or source with a share but no rows, and where both targets cannot hold at once.
    """
    for side, shares in ((1, categories), (0, sources or {})):
        rows = _margin(cells, side)
        empty = [name for name, share in shares.items() if share > 0 and not rows.get(name)]
        if empty or (shares and sum(shares.values()) <= 0):
            known = ", ".join(name for name, count in rows.items() if count)
            raise InputError(f"balance: no rows for {', '.join(empty) or 'any share'}; there are rows for {known}")
        _check(rows | dict.fromkeys(shares, 0), shares, ("source shares", "category shares")[side])
    kept = {cell: rows for cell, rows in cells.items() if categories.get(cell[1], 0) > 0 and rows}
    if sources:
        kept = {cell: rows for cell, rows in kept.items() if sources.get(cell[0], 0) > 0}
    mass = {cell: float(rows) for cell, rows in kept.items()}
    for _ in range(200):
        mass = _scaled(mass, categories, 1)
        mass = _scaled(mass, sources, 0) if sources else mass
    _reached(mass, categories, 1, "category")
    wanted = total or sum(kept.values())
    limits = _limits(kept, max_repeats)
    shares, limited = _fill(mass, limits, wanted, "balance")
    return Plan(_rounded(shares, wanted), kept, limited)


def _margin(cells: Mapping[tuple[str, str], float], side: int) -> dict[str, float]:
    sums: dict[str, float] = {}
    for cell, value in cells.items():
        sums[cell[side]] = sums.get(cell[side], 0) + value
    return sums


def _scaled(mass: Mapping[tuple[str, str], float], shares: Mapping[str, float], side: int) -> dict:
    sums, whole = _margin(mass, side), sum(shares.values())
    factor = {name: shares[name] / whole / value for name, value in sums.items() if value}
    return {cell: value * factor[cell[side]] for cell, value in mass.items() if cell[side] in factor}


def _reached(mass: Mapping[tuple[str, str], float], shares: Mapping[str, float], side: int, kind: str) -> None:
    sums, whole = _margin(mass, side), sum(shares.values())
    for name, share in shares.items():
        if abs(sums.get(name, 0.0) - share / whole) > 0.01:
            raise InputError(f"balance: {kind} {name} can reach {sums.get(name, 0.0):.0%} at these source shares; its "
                             f"target is {share / whole:.0%}. Change the shares, or add such rows to another source")


def _fill(
    mass: Mapping[Any, float], limits: Mapping[Any, float], wanted: float, where: str
) -> tuple[dict[Any, float], tuple[Any, ...]]:
    """`wanted` draws in proportion to mass, none above its limit; what is over goes to the others."""
    open_groups = {name for name, value in mass.items() if value > 0}
    if wanted and not open_groups:
        raise InputError(f"{where}: {wanted:.0f} draws asked for, but every group is empty")
    shares = dict.fromkeys(mass, 0.0)
    left = float(wanted)
    while open_groups:
        whole = sum(mass[name] for name in open_groups)
        full = {name for name in open_groups if left * mass[name] / whole > limits[name]}
        if not full:
            shares |= {name: left * mass[name] / whole for name in open_groups}
            left = 0.0
            break
        shares |= {name: limits[name] for name in full}
        left -= sum(limits[name] for name in full)
        open_groups -= full
    if left >= 1:
        raise InputError(f"{where}: {wanted:.0f} draws asked for, but max_repeats allows {wanted - left:.0f}")
    return shares, tuple(name for name in mass if mass[name] > 0 and shares[name] >= limits[name])


def _rounded(shares: Mapping[Any, float], wanted: int) -> dict[Any, int]:
    """Whole numbers with the same sum: largest remainders first, earlier groups in a tie."""
    counts = {name: math.floor(value + 1e-9) for name, value in shares.items()}
    by_remainder = sorted(shares, key=lambda name: counts[name] - shares[name])
    for name in by_remainder[: max(0, wanted - sum(counts.values()))]:
        counts[name] += 1
    return counts


def _check(available: Mapping[str, float], given: Mapping[str, float], what: str) -> None:
    for name, value in given.items():
        if name not in available:
            near = difflib.get_close_matches(str(name), [str(each) for each in available], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(map(str, available))}"
            raise InputError(f"mixture {what}: nothing is called {name!r}; {hint}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise InputError(f"mixture {what}: {name} has {value!r}; expected a number of at least 0")


def pick(groups: Sequence[Hashable], draws: Mapping[Any, int], seed: int | Sequence[int]) -> np.ndarray:
    """Row indices to draw, int64, group by group: whole passes over a group, then a random part of it without repeats.

    No row of a group is drawn twice more often than another. Depends on seed, group names and the order of rows only.
    """
    members: dict[Hashable, list[int]] = {}
    for row, name in enumerate(groups):
        members.setdefault(name, []).append(row)
    chosen = [np.zeros(0, np.int64)]
    for name in sorted(draws, key=str):
        rows = np.array(members.get(name, []), np.int64)
        if draws[name] and not len(rows):
            raise InputError(f"mixture: {name} has no rows, and {draws[name]} draws are planned")
        rng = np.random.default_rng([*np.atleast_1d(seed).tolist(), zlib.crc32(str(name).encode())])
        passes, rest = divmod(draws[name], max(1, len(rows)))
        chosen += [rows] * passes + [np.sort(rng.permutation(rows)[:rest])]
    return np.concatenate(chosen)


def realised(
    numbers: np.ndarray, names: Sequence[str], chosen: np.ndarray, tokens: Sequence[int] | np.ndarray | None = None
) -> dict[str, Any]:
    """What a plan comes to: by group rows, draws, shares in examples and supervised tokens, mean and most repeats.

    `numbers` is the group of every row, an index of `names`; `tokens` has the supervised tokens of every row.
    `effective_groups` is exp(entropy) of the example shares.
    """
    drawn = np.bincount(chosen, minlength=len(numbers))
    rows = np.bincount(numbers, minlength=len(names))
    draws = np.bincount(numbers, weights=drawn, minlength=len(names))
    mass = np.bincount(numbers, weights=drawn * (0 if tokens is None else np.asarray(tokens)), minlength=len(names))
    shares = draws / max(1.0, draws.sum())
    by_group = {
        name: {
            "rows": int(rows[number]),
            "draws": int(draws[number]),
            "share_of_examples": float(shares[number]),
            "share_of_tokens": float(mass[number] / mass.sum()) if mass.sum() else None,
            "repeats": float(draws[number] / rows[number]),
            "most_repeats": int(drawn[numbers == number].max(initial=0)),
        }
        for name, number in sorted((str(names[number]), number) for number in np.flatnonzero(rows).tolist())
    }
    positive = shares[shares > 0]
    effective = float(np.exp(-(positive * np.log(positive)).sum()))
    return {"groups": by_group, "draws": int(draws.sum()), "effective_groups": effective}
