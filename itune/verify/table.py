"""Rows of the table: what was compared, how far apart, and what is allowed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from itune.runtime.secrets import redact
from itune.types import InputError, RunError

BOUNDS = {"loss": 1e-6, "grad_norm": 1e-6, "parameters": 1e-5}  # contract 3 in docs/design.md
EXACT = dict.fromkeys(BOUNDS, 0.0)
WIDTH = 44
HEADER = f"{'pair that must agree':{WIDTH}}  {'loss':>8}  {'grad norm':>9}  {'parameters':>10}  {'bounds':20}"


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What a run over a few steps gave: losses and gradient norms by step, parameters at the end by path."""

    losses: np.ndarray
    grad_norms: np.ndarray
    params: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Row:
    """One pair. `differences` are relative and the largest; a name that is missing was not compared."""

    name: str
    differences: dict[str, float] = dataclasses.field(default_factory=dict)
    bounds: dict[str, float] = dataclasses.field(default_factory=lambda: dict(BOUNDS))
    reason: str = ""
    failed: bool = False  # one of the two ended with an error, which is the reason
    seconds: float = 0.0

    @property
    def passed(self) -> bool | None:
        """None where the pair is impossible; a difference that is not a number fails."""
        if self.failed:
            return False
        if not self.differences:
            return None
        return all(value <= self.bounds[name] for name, value in self.differences.items())

    def line(self) -> str:
        if not self.differences:
            return f"{self.name:{WIDTH}}  {'FAILED' if self.failed else 'not possible'}: {self.reason}"
        cells = [f"{self.differences[name]:.1e}" if name in self.differences else "-" for name in BOUNDS]
        bounds = " ".join(f"{self.bounds[name]:.0e}" for name in BOUNDS if name in self.differences)
        verdict = "agree" if self.passed else "DIFFER"
        line = f"{self.name:{WIDTH}}  {cells[0]:>8}  {cells[1]:>9}  {cells[2]:>10}  {bounds:20}  {verdict}"
        return f"{line}  {self.reason}".rstrip()

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: self.differences.get(name) for name in BOUNDS}
        return {"name": self.name, **numbers, "bounds": self.bounds, "passed": self.passed, "reason": self.reason,
                "seconds": self.seconds}  # fmt: skip


def compare(found: Numbers, wanted: Numbers) -> dict[str, float]:
    """The largest relative difference of a loss, of a gradient norm, and of a parameter tensor."""
    if sorted(found.params) != sorted(wanted.params):
        raise ValueError(f"other parameters: {sorted(set(found.params) ^ set(wanted.params))}")
    return {
        "loss": relative(found.losses, wanted.losses),
        "grad_norm": relative(found.grad_norms, wanted.grad_norms),
        "parameters": max(by_tensor(found.params, wanted.params).values()),
    }


def relative(found: Any, wanted: Any) -> float:
    """The largest |a - b| / |b|; equal numbers differ by 0, whatever they are."""
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    difference = np.where(found == wanted, 0.0, np.abs(found - wanted))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(difference == 0, 0.0, difference / np.abs(wanted))))


def by_tensor(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """||a - b|| / ||b|| of each tensor; 0 where they are equal."""
    distances = {name: np.linalg.norm(found[name].astype(np.float64) - wanted[name]) for name in wanted}
    sizes = {name: np.linalg.norm(wanted[name].astype(np.float64)) for name in wanted}
    with np.errstate(divide="ignore"):
        return {name: float(distance / sizes[name]) if distance else 0.0 for name, distance in distances.items()}


def timed(name: str, run: Callable[[], Row]) -> Row:
    """The row that `run` gives, with the seconds it took. InputError means that the pair is impossible here; what
    a run itself dies of fails the row, and the others go on."""
    begun = time.monotonic()
    try:
        row = run()
    except InputError as error:
        row = Row(name, reason=" ".join(str(error).split()))
    except (RunError, jax.errors.JaxRuntimeError) as error:
        row = Row(name, reason=" ".join(redact(str(error)).split())[:500], failed=True)
    return dataclasses.replace(row, name=name, seconds=time.monotonic() - begun)


def summarise(rows: Sequence[Row]) -> str:
    counts = [sum(row.passed is verdict for row in rows) for verdict in (True, False, None)]
    seconds = sum(row.seconds for row in rows)
    return f"{counts[0]} agree, {counts[1]} differ, {counts[2]} not possible here; {seconds:.0f} s"
