"""Eight devices on a machine that has none."""

from __future__ import annotations

import contextlib
import os
import re

import jax

COUNT = 8
_FLAG = "--xla_force_host_platform_device_count"


def ask_for_cpu_devices() -> None:
    """Have jax divide the CPU into eight devices. Accelerators stay as they are; so does a jax that has started."""
    if _FLAG in os.environ.get("XLA_FLAGS", ""):
        return
    with contextlib.suppress(RuntimeError):  # jax has started: whatever devices there are will have to do
        jax.config.update("jax_num_cpu_devices", COUNT)


def usable() -> int:
    """The number of devices that meshes are made of: the largest power of two that is there, at most eight."""
    return 1 << (min(jax.device_count(), COUNT).bit_length() - 1)


def cpu_environment(count: int) -> dict[str, str]:
    """This process's environment for a child that has `count` CPU devices and nothing else."""
    flags = re.sub(rf"{_FLAG}=\d+", "", os.environ.get("XLA_FLAGS", "")).split()
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join([*flags, f"{_FLAG}={count}"])}
