"""What one chip has, and slices of them by name: "v5e:4x4", "v6e:2x4", "v5p:2x2x1", "gpu:h200:8", "2*v5e:4x4".

Memory, memory bandwidth and interconnect of TPUs: cloud.google.com/tpu/docs (pages v5e, v5p, v6e); of GPUs: NVIDIA's
data sheets (NVLink 4). Peak FLOP/s in bfloat16 stand in itune/flops.py; in float32 without TF32, as itune computes it,
NVIDIA's data sheets say 67 TFLOP/s of H100 SXM and H200 and 19.5 of A100 ("FP32"). A TPU multiplies in bfloat16 only: a
float32 product (precision HIGHEST) is six of its passes. `efficiency` is an assumption, stated wherever a time
is: the share of peak that large matrix products and attention reach together, after published runs (MaxText 61 to 71 %
MFU of dense models on v5e and v5p, 47 % on v6e; torchtitan and MaxText near 50 % on H100).
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from itune.flops import peak_flops
from itune.runtime.cuda import MEMORY_SHARE
from itune.types import InputError

OVERLAP_EFFICIENCY = 0.8  # of interconnect and memory bandwidth, an assumption too
PASSES = 6  # in bfloat16, of a float32 product on a TPU


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device. `memory` bytes that a program may use, `memory_bandwidth` and `interconnect` bytes/s.

    `interconnect`: what a device can receive from the others of its slice, all links together, with wrapped rings;
    `network`: from other slices or hosts. `efficiency`, and `float32` FLOP/s (0: passes in bfloat16): see above.
    """

    name: str
    kind: str
    memory: int
    memory_bandwidth: float
    interconnect: float
    network: float
    efficiency: float
    float32: float = 0.0

    @property
    def peak(self) -> float:
        """bfloat16 FLOP/s at most."""
        return peak_flops(self.kind) or 0.0

    def peak_in(self, dtype: str) -> float:
        """FLOP/s at most of products in a compute dtype."""
        return (self.float32 or self.peak / PASSES) if dtype == "float32" else self.peak


GIB = 2**30
# TPU memory is what the compiler lets a program have: 15.75 of 16 GiB on v5e, 31.25 of 32 on v6e, 95.74 on v5p; of a
# GPU's, what itune has jax take
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "TPU v5 lite", int(15.75 * GIB), 819e9, 200e9, 3.1e9, 0.60),
        Chip("v5p", "TPU v5", int(95.74 * GIB), 2765e9, 600e9, 6.25e9, 0.62),
        Chip("v6e", "TPU v6 lite", int(31.25 * GIB), 1638e9, 400e9, 12.5e9, 0.50),
        Chip("h100", "NVIDIA H100", int(MEMORY_SHARE * 79.1 * GIB), 3350e9, 450e9, 50e9, 0.52, 67e12),
        Chip("h200", "NVIDIA H200", int(MEMORY_SHARE * 139.8 * GIB), 4800e9, 450e9, 50e9, 0.52, 67e12),
        Chip("a100", "NVIDIA A100", int(MEMORY_SHARE * 79.1 * GIB), 2039e9, 300e9, 25e9, 0.52, 19.5e12),
    )
}
_WRAPS = {"v5e": 16, "v6e": 16, "v5p": 4}  # a ring closes along an axis of this many chips (a multiple of it)
_DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3}
_SIDES = {"v5e": "sides of 1, 2, 4, 8 or 16", "v6e": "sides of 1, 2, 4, 8 or 16",
          "v5p": "sides of 1, 2, or a multiple of 4 up to 28"}  # fmt: skip
HOST = 8  # GPUs that NVLink connects
THIS_MACHINE = "this machine"


@dataclasses.dataclass(frozen=True)
class Slice:
    """`slices` equal groups of `chips` chips; between groups runs the data-center network."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def is_tpu(self) -> bool:
        return self.chip.name in _DIMENSIONS

    @property
    def chips(self) -> int:
        return self.slices * math.prod(self.shape)

    @property
    def interconnect(self) -> float:
        """Bytes/s that a device receives inside its slice: axes of one chip have no link, unclosed rings half."""
        if not self.is_tpu:
            return self.chip.interconnect
        per_axis = self.chip.interconnect / _DIMENSIONS[self.chip.name]
        wraps = _WRAPS[self.chip.name]
        return sum(per_axis * (1 if size % wraps == 0 else 0.5) for size in self.shape if size > 1) or per_axis


def parse_topology(name: str) -> Slice:
    """The slice that a name means. Raises InputError for an unknown chip or a malformed name, with the nearest."""
    found = re.fullmatch(r"(?:(\d+)\*)?(?:(gpu):)?([a-z]\w*):(\d+(?:x\d+)*)", name.lower())
    if found is None:
        raise InputError(
            f"--topology {name!r}: expected CHIP:SHAPE such as v5e:4x4, v6e:2x4, v5p:2x2x1, gpu:h200:1, or 2*v5e:4x4 "
            "for two slices"
        )
    slices, gpu, chip, shape = found.groups()
    known = [key for key in CHIPS if (key in _DIMENSIONS) != bool(gpu)]
    if chip not in known:
        near = difflib.get_close_matches(chip, known, n=1, cutoff=0.3)
        hint = f"; nearest: {near[0]}" if near else ""
        hint = f"; a GPU is gpu:{chip}:{shape}" if chip in CHIPS and not gpu else hint
        raise InputError(f"--topology {name!r}: unknown chip {chip!r}; known here: {', '.join(known)}{hint}")
    sizes = tuple(map(int, shape.split("x")))
    wanted = _DIMENSIONS.get(chip, 1)
    if len(sizes) != wanted or 0 in sizes or slices == "0":
        example = {1: "gpu:h200:8", 2: "v5e:4x4", 3: "v5p:2x2x1"}[wanted]
        counts = "1 size" if wanted == 1 else f"{wanted} sizes"
        raise InputError(f"--topology {name!r}: {chip} takes {counts} of at least 1, such as {example}")
    count = int(slices or 1)
    if gpu and sizes[0] > HOST:  # NVLink ends at the host
        if sizes[0] % HOST:
            raise InputError(f"--topology {name!r}: a host has {HOST} GPUs; expected up to {HOST}, or a multiple of it")
        count, sizes = count * sizes[0] // HOST, (HOST,)
    if not gpu and not all(_is_side(chip, size) for size in sizes):
        raise InputError(f"--topology {name!r}: no slice has these sides; expected {_SIDES[chip]}")
    return Slice(name.lower(), CHIPS[chip], sizes, count)


def _is_side(chip: str, size: int) -> bool:
    return size in (1, 2, 4, 8, 16) or (chip == "v5p" and size % 4 == 0 and size <= 28)


def here(devices: Sequence[Any]) -> Slice | None:
    """The slice that these devices are, None where their chip is not in the table: a CPU.

    TPU chips that fill a box of their mesh have its name ("v5e:2x4"), GPUs of one host theirs ("gpu:h200:8"), which
    can be compiled for; others lie in a row. A GPU with less memory than its namesake in the table keeps its own.
    """
    kind = devices[0].device_kind.lower()
    found = [chip for chip in CHIPS.values() if chip.kind.lower() == kind]
    found = found or [chip for chip in CHIPS.values() if chip.name in re.findall(r"\w+", kind)]
    if not found:
        return None
    chip, count = found[0], len(devices)
    if chip.name in _DIMENSIONS:
        places = [tuple(device.coords[: _DIMENSIONS[chip.name]]) for device in devices]
        shape = tuple(max(axis) - min(axis) + 1 for axis in zip(*places, strict=True))
        slices = len({getattr(device, "slice_index", 0) for device in devices})
        if slices * math.prod(shape) == count == slices * len(set(places)):
            several = f"{slices}*" if slices > 1 else ""
            return Slice(f"{several}{chip.name}:{'x'.join(map(str, shape))}", chip, shape, slices)
    elif 0 < (memory := device_memory(devices[0])) < 0.95 * chip.memory:
        chip = dataclasses.replace(chip, memory=memory)
    elif count <= HOST and len({device.process_index for device in devices}) == 1:
        return Slice(f"gpu:{chip.name}:{count}", chip, (count,))
    return Slice(THIS_MACHINE, chip, (count,))


def device_memory(device: Any) -> int:
    """Bytes that programs may use on an accelerator of this machine; 0 where that is not known."""
    try:
        stats = device.memory_stats() or {}
    except Exception:  # backends without statistics raise their own
        return 0
    return int(stats.get("bytes_limit", 0))
