"""What a run directory holds, read once: numbers, settings, evaluations, proofs."""

from __future__ import annotations

import dataclasses
import functools
import os
from pathlib import Path
from typing import Any

from itune.evaluators import flatten, read_items, read_json, read_summaries
from itune.evaluators.paired import comparable, compare_judged
from itune.types import InputError
from itune.writers import read_metrics


@dataclasses.dataclass(frozen=True)
class RunFiles:
    """A run directory as the report sees it. Whatever is missing is empty."""

    folder: Path
    records: list[dict[str, Any]]
    evaluations: dict[int, dict[str, Any]]  # step -> evaluator -> summary
    depth: int = 1  # folders of its path that its name consists of

    @property
    def name(self) -> str:
        return "/".join(self.folder.absolute().parts[-self.depth :])

    def json(self, path: str) -> dict[str, Any]:
        """A JSON file of the run; {} where there is none, or half of one."""
        try:
            return read_json(self.folder / path)
        except InputError:
            return {}

    def items(self, step: int, evaluator: str) -> list[dict[str, Any]]:
        return read_items(self.folder / "eval" / str(step) / f"{evaluator}.jsonl")

    @property
    def steps(self) -> list[int]:
        return sorted(self.evaluations)

    @property
    def last(self) -> int:
        """The newest step that was judged; 0 where there is none."""
        return max(self.evaluations, default=0)

    def evaluators(self) -> list[str]:
        """Names of the evaluators, in the order in which the newest evaluation has them."""
        newest = self.evaluations.get(self.last, {})
        return list(dict.fromkeys([*newest, *(name for step in self.steps for name in self.evaluations[step])]))

    @functools.cached_property
    def paired(self) -> dict[str, dict[str, Any]]:
        """Base against the newest step, by evaluator."""
        if not self.last or 0 not in self.evaluations:
            return {}
        return {name: found for name in self.evaluators() if (found := pair(self, 0, self, self.last, name))}


def pair(one: RunFiles, step: int, other: RunFiles, other_step: int, evaluator: str) -> dict[str, Any]:
    """The paired comparison of two evaluations; `refused` alone says why not; {} where nothing can be compared."""
    base, tuned = one.items(step, evaluator), other.items(other_step, evaluator)
    if not comparable(base) or not comparable(tuned):
        return {}
    summaries = [run.evaluations.get(at, {}).get(evaluator, {}) for run, at in ((one, step), (other, other_step))]
    found = compare_judged(base, tuned, *summaries)
    return found if found["n"] or "refused" in found else {}


def read_run(workdir: str | os.PathLike) -> RunFiles:
    """The files of a run directory. Raises InputError for another folder, and for damaged numbers."""
    folder = Path(workdir)
    records = read_metrics(folder / "metrics.jsonl")
    if not records and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a run directory: it has neither metrics.jsonl nor config.json")
    evaluations = {}
    for path in (folder / "eval").glob("*/summary.json"):
        if path.parent.name.isdecimal():
            evaluations[int(path.parent.name)] = read_summaries(path)
    return RunFiles(folder, records, evaluations)


def read_two(workdir: str | os.PathLike, other: str | os.PathLike) -> tuple[RunFiles, RunFiles]:
    """Two runs, each with the shortest name that tells it from the other."""
    one, two = read_run(workdir), read_run(other)
    parts = [run.folder.absolute().parts for run in (one, two)]
    for depth in range(1, max(map(len, parts)) + 1):
        if parts[0][-depth:] != parts[1][-depth:]:
            return dataclasses.replace(one, depth=depth), dataclasses.replace(two, depth=depth)
    return one, two


def read_evaluations(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, {evaluator/metric: number}) of every evaluation of a run, by step."""
    evaluations = read_run(folder).evaluations
    return [(step, flatten(evaluations[step])) for step in sorted(evaluations)]
