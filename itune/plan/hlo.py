"""What a compiled program moves between devices, read from its optimised HLO text, loops counted.

XLA's own cost analysis takes a loop's body once and hides collectives inside fusions. Here each computation counts as
often as it is reached: a while loop's trip count is what XLA says, or its bound over its step where both are constants.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4,
          "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)


class Instruction(NamedTuple):
    """One line: its result's type as text, its operation, and what stands behind the operation's name."""

    name: str
    shape: str
    operation: str
    rest: str


class Collective(NamedTuple):
    """A collective operation: kind, type of its result, devices in a group, how often a step runs it, bytes a run.

    Bytes: what one device receives, if it receives nothing twice.
    """

    kind: str
    shape: str
    group: int
    times: float
    bytes_once: float
    source: str

    @property
    def bytes(self) -> float:
        return self.times * self.bytes_once


def computations(text: str) -> dict[str, list[Instruction]]:
    """Name -> instructions, of every computation; the entry's name is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = "ENTRY" if line.startswith("ENTRY") else line.split(" ", 1)[0].lstrip("%")
            current = found.setdefault(name, [])
        elif match := _INSTRUCTION.match(line):
            _, name, shape, operation, rest = match.groups()
            current.append(Instruction(name, shape, operation, rest))
    return found


def collectives(text: str, unknown_trips: int = 1) -> list[Collective]:
    """Every collective of the program. A loop without a constant bound counts `unknown_trips` times.

    XLA may spread one collective over several fusions that compute beside it; they share its channel, and it counts
    once. Those of `shard_map` all have the same channel: they are told apart by their shape and where they come from.
    """
    bodies = computations(text)
    seen: dict[str, Collective] = {}
    for name, times in _reached(bodies, unknown_trips).items():
        for index, instruction in enumerate(bodies[name]):
            kind = instruction.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            one = _collective(kind, instruction, times, name)
            what = f"{kind} {list(arrays(one.shape))} {one.source}"
            key = f"channel {channel[1]} {what}" if channel else f"{name} {index}"
            if key not in seen or times < seen[key].times:  # the rarest is its start
                seen[key] = one
    return list(seen.values())


def between_slices(text: str, unknown_trips: int = 1) -> list[Collective]:
    """Every collective between TPU slices: libtpu hands them to the hosts' network, as a pair of send and recv.

    `group` is the number of slices, `source` the name of the collective that it was. A collective over all devices
    becomes one of these and one inside each slice, which `collectives` finds.
    """
    bodies = computations(text)
    found = []
    for name, times in _reached(bodies, unknown_trips).items():
        for instruction in bodies[name]:
            handed = re.search(r'_xla_megascale_transfer_type="(\w+)"', instruction.rest)
            if instruction.operation != "recv" or not handed:
                continue
            kind, group = handed[1].lower().replace("_", "-"), _slices(instruction.rest)
            dtype, dims = next(arrays(instruction.shape))  # behind it stand flags
            received = _received(kind, float(_BYTES[dtype] * math.prod(dims)), group)
            was = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', instruction.rest)
            shape = f"{dtype}[{','.join(map(str, dims))}]"
            found.append(Collective(kind, shape, group, times, received, was[1] if was else ""))
    return found


def _slices(rest: str) -> int:
    """Slices that take part: {1,2}x{0:3}, or {{100000,...,200003}}, where a device's number begins with its slice's."""
    if several := re.search(r'_xla_megascale_target="\{([\d,]+)\}x', rest):
        return len(several[1].split(","))
    listed = re.search(r"_xla_megascale_target=\{\{([\d,]+)\}", rest)
    return len({int(device) // 100_000 for device in listed[1].split(",")}) if listed else 0


def moved(found: Iterable[Collective]) -> dict[str, float]:
    """Kind -> bytes that one device receives a step."""
    total: dict[str, float] = collections.defaultdict(float)
    for collective in found:
        total[collective.kind] += collective.bytes
    return dict(total)


def arrays(shape: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(dtype, dimensions) of each array in a type's text."""
    for dtype, dims in re.findall(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]", shape):
        if dtype in _BYTES:
            yield dtype, tuple(int(d) for d in dims.split(",") if d)


def _collective(kind: str, instruction: Instruction, times: float, computation: str) -> Collective:
    found = list(arrays(instruction.shape))
    started = instruction.operation.endswith("-start")
    if started and kind != "all-reduce":  # (operands, results, flags)
        found = [array for array in found if array != ("u32", ())]
        found = found[len(found) // 2 :]
    group, size = _group(instruction.rest), float(sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in found))
    source = re.search(r'op_name="([^"]*)"', instruction.rest)
    if kind == "all-reduce" and "all-reduce-scatter" in computation:  # a fusion of sum and slice: its result is whole
        kind, size = "reduce-scatter", size / max(group, 1)
    received = _received(kind, size, group)
    return Collective(kind, instruction.shape, group, times, received, source[1] if source else "")


def _received(kind: str, size: float, group: int) -> float:
    """Bytes that one of a group receives of a collective whose result has `size` bytes on each."""
    share = (group - 1) / group if group else 1.0
    factors = {"all-reduce": 2 * share, "collective-permute": 1.0, "reduce-scatter": float(max(group - 1, 1))}
    return size * factors.get(kind, share)


def _group(rest: str) -> int:
    """Devices in a group: {{0,1,...},...}, [groups,size]<=[devices] or mesh['a'=4,'b'=2] {'a'}; 0: none is given."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return len(listed[1].split(","))
    if counted := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
        return int(counted[2])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", named[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'([^']*)'", named[2]))
    return 0


def _reached(bodies: dict[str, list[Instruction]], unknown_trips: int) -> dict[str, float]:
    """Computation -> how often a run of the program passes through it."""
    times: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, count: float) -> None:
        times[name] += count
        for instruction in bodies.get(name, ()):
            trips = _trips(bodies, name, instruction, unknown_trips) if instruction.operation == "while" else 1
            for one, several in _CALLED.findall(instruction.rest):
                for called in (one,) if one else re.findall(r"[\w.\-]+", several):
                    if called in bodies:
                        visit(called, count * trips)

    visit("ENTRY", 1.0)
    return {name: count for name, count in times.items() if name in bodies}


def _trips(bodies: dict[str, list[Instruction]], where: str, loop: Instruction, unknown: int) -> int:
    """Trip count of a while loop (of computation `where`) that counts to a constant by a constant step.

    XLA for GPUs says it (and hides the comparison in a fusion); for TPUs it is read from the loop.
    """
    if said := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(said[1])
    condition, body = (re.search(rf"{part}=%?([\w.\-]+)", loop.rest) for part in ("condition", "body"))
    if condition is None or body is None:
        return unknown
    table = {instruction.name: instruction for instruction in bodies.get(condition[1], ())}
    for instruction in table.values():
        if instruction.operation != "compare" or "direction=LT" not in instruction.rest:
            continue
        left, right = (table.get(name) for name in _operands(instruction)[:2])
        place = re.search(r"index=(\d+)", left.rest) if left and left.operation == "get-tuple-element" else None
        if place and right and right.operation == "constant":
            bound = int(right.rest.split(")")[0])
            begin = _start(bodies[where], loop, int(place[1]))
            return math.ceil((bound - begin) / _step(bodies.get(body[1], []), int(place[1])))
    return unknown


def _start(around: list[Instruction], loop: Instruction, place: int) -> int:
    """Element `place` of the tuple that a loop begins with: above 0 where XLA took the first turns out of it."""
    table = {instruction.name: instruction for instruction in around}
    first = table.get(_operands(loop)[0]) if _operands(loop) else None
    operands = _operands(first) if first and first.operation == "tuple" else []
    return _value(table, operands[place]) if place < len(operands) else 0


def _step(body: list[Instruction], place: int) -> int:
    """What a loop's body adds to element `place` of its tuple; 1 where that cannot be read."""
    table = {instruction.name: instruction for instruction in body}
    root = body[-1] if body and body[-1].operation == "tuple" else None
    operands = _operands(root) if root else []
    return max(_value(table, operands[place]), 1) if place < len(operands) else 1


def _value(table: dict[str, Instruction], name: str) -> int:
    """The sum of the constants that an integer is made of."""
    instruction = table.get(name)
    if instruction is None:
        return 0
    if instruction.operation == "constant":
        return int(instruction.rest.split(")")[0])
    if instruction.operation == "add":
        return sum(_value(table, operand) for operand in _operands(instruction)[:2])
    return _value(table, _operands(instruction)[0]) if instruction.operation in ("copy", "bitcast") else 0


def _operands(instruction: Instruction) -> list[str]:
    return re.findall(r"%([\w.\-]+)", instruction.rest.split("), ")[0])
