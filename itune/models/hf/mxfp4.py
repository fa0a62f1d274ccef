"""MXFP4 tensors (OCP microscaling formats 1.0): blocks of 32 four-bit floats that share a power of two.

A checkpoint stores the kernel `x` (E, in, out) as `x_blocks` (E, out, in / 32, 16), two values a byte, the low half
first, and `x_scales` (E, out, in / 32), exponents with a bias of 127; both uint8. bfloat16 holds the values exactly.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from itune.models.hf.files import Tensor

MXFP4 = "MXFP4"
_VALUES = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
_FOUR_BITS = np.concatenate([_VALUES, -_VALUES])
_PAIRS = np.stack([_FOUR_BITS[np.arange(256) & 15], _FOUR_BITS[np.arange(256) >> 4]], axis=-1)  # (byte, 2)
with np.errstate(over="ignore"):
    _POWERS = np.ldexp(np.float32(1), np.arange(256) - 127).astype(np.float32)
_POWERS[255] = np.nan  # so the format says


def join(found: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with each pair of blocks and scales as one MXFP4 tensor, and what is wrong with pairs."""
    tensors, problems = dict(found), []
    for name in [name for name in found if name.endswith("_blocks")]:
        whole = name.removesuffix("_blocks")
        blocks, scales = tensors.pop(name), tensors.pop(f"{whole}_scales", None)
        if scales is None:
            problems.append(f"missing: {whole}_scales (of {name} {list(blocks.shape)})")
            continue
        wrong = [f"dtype: {part.name} is {part.dtype}, expected U8" for part in (blocks, scales) if part.dtype != "U8"]
        if len(blocks.shape) != 4 or blocks.shape[3] != 16 or blocks.shape[:3] != scales.shape:
            shapes = f"{list(blocks.shape)} and {list(scales.shape)}"
            wrong.append(f"shape: {name} and {scales.name} are {shapes}, expected [E, out, in / 32, 16] and the first "
                         "three of these")  # fmt: skip
        if whole in tensors:
            wrong.append(f"twice: {whole} is there packed and unpacked")
        cut = [t for t in (blocks, scales) if t.stop - t.start != math.prod(t.shape)]
        wrong += [f"size: {t.name} has {t.stop - t.start} bytes for shape {list(t.shape)}" for t in cut]
        problems += wrong
        if not wrong:
            count, out, groups, _ = blocks.shape
            tensors[whole] = dataclasses.replace(
                blocks, name=whole, dtype=MXFP4, shape=(count, groups * 32, out), scales=scales
            )
    return tensors, problems


def unpack(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 blocks (rows, groups * 16) and scales (rows, groups) -> float32 (rows, groups * 32)."""
    rows, groups = scales.shape
    values = _PAIRS[blocks].reshape(rows, groups, 32)
    with np.errstate(over="ignore", invalid="ignore"):
        values *= _POWERS[scales][..., None]
    return values.reshape(rows, groups * 32)
