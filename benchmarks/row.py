"""What a row of the benchmarks is, and how a side of it runs in a process of its own."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

THREADS = 2


@dataclasses.dataclass(frozen=True)
class Bound:
    """itune's median of `measure` over the peer's (or over its own other side) must be at least or at most `value`.

    Where the machine was busy and the side reports `busy`, that measure (CPU-seconds) stands in for wall time.
    """

    measure: str
    at_least: float | None = None
    at_most: float | None = None
    busy: str = ""
    peer: str = ""  # a side; "": the second one
    absolute: bool = False  # the measure itself is bounded, not its ratio

    def holds(self, value: float) -> bool:
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def text(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison. `sides`: name -> function(folder) -> measures, run in turn, each in its own process.

    prepare(folder): inputs that the sides share, made once. equal: measures (numbers or lists) that must agree between
    the sides, with the largest absolute difference allowed; checked in the first round, before anything is repeated.
    """

    title: str
    sides: dict[str, Callable[[Path], dict[str, Any]]]
    bounds: tuple[Bound, ...] = ()
    prepare: Callable[[Path], None] | None = None
    equal: tuple[tuple[str, float], ...] = ()
    repeats: int = 5
    timeout: int = 420  # seconds of one side in one round
    note: str = ""


def load(name: str) -> Row:
    """The row of `benchmarks/rows/NAME.py`."""
    row: Row = importlib.import_module(f"benchmarks.rows.{name}").ROW
    return row


def names() -> list[str]:
    """Every row, in the order of the table."""
    order = (Path(__file__).parent / "rows" / "ORDER").read_text().split()
    found = {path.stem for path in (Path(__file__).parent / "rows").glob("*.py")} - {"__init__"}
    return [name for name in order if name in found] + sorted(found - set(order))


class Clock:
    """Wall and CPU seconds of this process and the children that ended, from `start`."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self._wall, self._cpu = time.perf_counter(), cpu_seconds()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._wall, cpu_seconds() - self._cpu


def cpu_seconds() -> float:
    """CPU-seconds of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def process_age() -> float:
    """Seconds since this process was started, imports included."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def script_lines(script: str, *arguments: str) -> list[dict[str, Any]]:
    """The JSON lines that a script of this folder prints."""
    command = [sys.executable, str(Path(__file__).parent / script), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def main() -> None:
    """`python -m benchmarks.row NAME SIDE FOLDER`: run one side (or `prepare`), print its measures as the last line."""
    name, side, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    row = load(name)
    if side == "prepare":
        if row.prepare:
            row.prepare(folder)
        measures: dict[str, Any] = {}
    else:
        measures = row.sides[side](folder)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    measures.setdefault("peak_gb", usage.ru_maxrss / 1e6)
    measures.setdefault("process_cpu_seconds", cpu_seconds())
    print("\n" + json.dumps(measures), flush=True)
    os._exit(0)  # what threads of either side still do is not measured


if __name__ == "__main__":
    main()
