"""Where the time of traced steps went: compute, communication, waiting for input, anything else.

Read from the file that jax.profiler writes, with the reader that comes with jax. The window is what the loop marked as
steps, less what it marked as saving or evaluating. An operation is communication by its name (XLA's names of
collectives, NCCL's kernels); a collective and the wait for the other devices in it are the same event.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax

STEPS, INPUT = "itune/steps", "itune/input"  # marks of the loop: the traced steps, its waits for the next batch
ASIDE = ("itune/save", "itune/evaluate")  # phases between steps that are no part of one

Interval = tuple[float, float]

_COMMUNICATION = re.compile(
    r"(ragged[-_])?all[-_](reduce|gather|to[-_]all)|reduce[-_]scatter|collective[-_](permute|broadcast)"
    r"|async[-_]collective[-_](start|done)|(send|recv)([-_]done)?(?![a-z_])|p(sum|max|min|permute|broadcast)|nccl|MemcpyP2P"
)
_CONTAINER = re.compile(r"(while|conditional|call)(?![a-z_-])")  # what runs in them has events of its own
_TRANSFER = re.compile(r"Memcpy(H2D|D2H)|Memset")


class Shares(NamedTuple):
    """Shares of the time of traced steps, a mean over this process's devices; the four without `hidden` add up to 1.

    compute: a device computes, whatever else goes on. communication: it communicates and computes nothing;
    communication_hidden: it does both, which `compute` holds already. input_wait: it does neither while the loop waits
    for a batch. seconds: the time that the shares are of.
    """

    compute: float
    communication: float
    communication_hidden: float
    input_wait: float
    other: float
    seconds: float
    devices: int

    def line(self) -> str:
        """compute 91.0%, communication 6.0% (and 4.0% hidden behind compute), input wait 1.0%, other 2.0%"""
        values = tenths((self.compute, self.communication, self.input_wait, self.other))
        compute, communication, wait, other = (f"{value / 10:.1f}%" for value in values)
        hidden = f" (and {self.communication_hidden:.1%} hidden behind compute)" if self.communication_hidden else ""
        return f"compute {compute}, communication {communication}{hidden}, input wait {wait}, other {other}"


def read_shares(path: Path) -> Shares:
    """The shares of one process's trace. Raises ValueError when it holds no steps, or nothing that ran in them."""
    devices, marks = _read(jax.profiler.ProfileData.from_file(str(path)))
    window = without(merge(marks[STEPS]), merge(span for name in ASIDE for span in marks[name]))
    seconds = length(window)
    if not seconds:
        raise ValueError("the trace holds no steps")
    rows = [_of_device(window, merge(computes), merge(communicates), merge(marks[INPUT]))
            for computes, communicates in devices.values()]  # fmt: skip
    if not any(sum(row[:2]) for row in rows):
        raise ValueError("the trace holds no operation of a device within the steps")
    compute, communication, hidden, wait = (sum(column) / len(rows) / seconds for column in zip(*rows, strict=True))
    other = max(0.0, 1 - compute - communication - wait)  # rounding
    return Shares(compute, communication, hidden, wait, other, seconds / 1e9, len(rows))


def _of_device(
    window: list[Interval], computes: list[Interval], communicates: list[Interval], waits: list[Interval]
) -> tuple[float, float, float, float]:
    """Lengths: compute, communication alone, communication beside compute, waiting for input in idle time."""
    computes, communicates = overlap(window, computes), overlap(window, communicates)
    alone = without(communicates, computes)
    idle = without(without(window, computes), communicates)
    return length(computes), length(alone), length(communicates) - length(alone), length(overlap(idle, waits))


def _read(data: Any) -> tuple[dict[str, tuple[list[Interval], list[Interval]]], dict[str, list[Interval]]]:
    """(device -> its times of compute and of communication, mark -> its times), in nanoseconds."""
    accelerators: dict[str, tuple[list[Interval], list[Interval]]] = collections.defaultdict(lambda: ([], []))
    cpus: dict[str, tuple[list[Interval], list[Interval]]] = collections.defaultdict(lambda: ([], []))
    marks: dict[str, list[Interval]] = collections.defaultdict(list)
    for plane in data.planes:
        device = re.match(r"/device:(TPU|GPU):\d+", plane.name)
        for line in plane.lines:
            if device and (line.name in ("XLA Ops", "Async XLA Ops") or line.name.startswith("Stream")):
                for event in line.events:
                    _sort(event, dict(event.stats), accelerators[device[0]], line.name.startswith("Async"))
            elif plane.name == "/host:CPU":
                for event in line.events:
                    if event.name.startswith("itune/"):
                        marks[event.name].append((event.start_ns, event.end_ns))
                    elif event.duration_ns and not event.name.startswith("end: "):
                        stats = dict(event.stats)
                        if "hlo_op" in stats:
                            _sort(event, stats, cpus[str(stats.get("device_ordinal", 0))], False)
    return accelerators or cpus, marks


def _sort(event: Any, stats: dict[str, Any], device: tuple[list[Interval], list[Interval]], beside: bool) -> None:
    """Put an operation where it belongs; `beside`: on a line of transfers that run beside the operations."""
    computes, communicates = device
    # a TPU's events carry the whole instruction, %name = type operation(...), calls=%name
    name, _, text = event.name.lstrip("%").partition(" = ")
    called = re.search(r"calls=%?([\w.\-]+)", text)
    names = (name, str(stats.get("hlo_op", "")).lstrip("%"), called[1] if called else "")
    if any(_COMMUNICATION.match(one) for one in names):
        communicates.append((event.start_ns, event.end_ns))
    elif not beside and not _TRANSFER.match(name) and not any(_CONTAINER.match(one) for one in names[:2]):
        computes.append((event.start_ns, event.end_ns))


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Their union: disjoint, in order, none empty."""
    merged: list[Interval] = []
    for start, end in sorted(one for one in intervals if one[0] < one[1]):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(merged[-1][1], end)
        else:
            merged.append((start, end))
    return merged


def overlap(these: list[Interval], those: list[Interval]) -> list[Interval]:
    """What lies in both; both as `merge` gives them."""
    found, i, j = [], 0, 0
    while i < len(these) and j < len(those):
        start, end = max(these[i][0], those[j][0]), min(these[i][1], those[j][1])
        if start < end:
            found.append((start, end))
        if these[i][1] < those[j][1]:
            i += 1
        else:
            j += 1
    return found


def without(these: list[Interval], those: list[Interval]) -> list[Interval]:
    """What lies in `these` and not in `those`; both as `merge` gives them."""
    borders = [-math.inf, *(border for interval in those for border in interval), math.inf]
    return overlap(these, list(zip(borders[::2], borders[1::2], strict=True)))


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def tenths(shares: Iterable[float]) -> list[int]:
    """Shares that add up to 1 in tenths of a percent that add up to 1000: the largest remainders are rounded up."""
    exact = [1000 * share for share in shares]
    whole = [math.floor(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: whole[i] - exact[i])
    for i in order[: max(0, 1000 - sum(whole))]:
        whole[i] += 1
    return whole
