"""Options of XLA by kind of device: one small table, each with its reason. Results change by rounding at most.

`XLA_FLAGS` and `LIBTPU_INIT_ARGS` of the user come first where they name the same option.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jaxlib


class Option(NamedTuple):
    """An option for devices whose `device_kind` contains `device`, for releases of jaxlib before `before`."""

    device: str
    name: str
    value: Any
    reason: str
    before: tuple[int, int] = (99, 0)


# libtpu refuses it for v5p: "incorrect results, hangs"
_BESIDE = "a collective travels while a product runs; MaxText and axlearn set it, libtpu alone does not"
TABLE = (
    Option("cpu", "xla_cpu_use_fusion_emitters", False,
           "programs run as fast and compile in two thirds of the time; from 0.11 on there is no such switch", (0, 11)),
    Option("TPU v6 lite", "xla_tpu_scoped_vmem_limit_kib", "98304",
           "three quarters of the 128 MiB beside a v6e core, for larger fusions; libtpu takes a fraction of it"),
    *(Option("TPU v5 lite", name, "true", _BESIDE) for name in (
        "xla_tpu_enable_async_collective_fusion",
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather",
        "xla_tpu_enable_async_collective_fusion_multiple_steps",
        "xla_tpu_overlap_compute_collective_tc",
        "xla_enable_async_all_gather",
    )),
)  # fmt: skip


def options(device: Any) -> dict[str, Any] | None:
    """`compiler_options` of `jax.jit` for a program that runs on devices like this one; None where there are none."""
    release = tuple(map(int, jaxlib.__version__.split(".")[:2]))
    said = os.environ.get("XLA_FLAGS", "") + os.environ.get("LIBTPU_INIT_ARGS", "")
    chosen = {
        option.name: option.value for option in TABLE
        if option.device in device.device_kind and release < option.before and option.name not in said
    }
    return chosen or None
