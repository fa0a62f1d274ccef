"""What a run ran on: versions, devices, revision, command, memory."""

from __future__ import annotations

import contextlib
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from itune.runtime.secrets import redact

# bytes that a container may use, by version 2 and 1 of Linux' control groups
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_PACKAGES = (
    "itune", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers", "datasets",
)


def environment() -> dict[str, Any]:
    """Versions, devices, revision of the working tree and the command, as `environment.json` keeps them."""
    return {
        "command": [redact(word) for word in sys.argv],
        "folder": str(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
        "backend": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "git_revision": _git_revision(),
    }


def memory_in_use() -> int:
    """Most bytes that a device of this process held so far; without such a count (CPU), most bytes of the process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if isinstance(s, Mapping) and "peak_bytes_in_use" in s]
    return max(peaks) if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_memory() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container where that has a limit."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in _LIMITS:
        with contextlib.suppress(OSError, ValueError):  # absent, or "max": no limit
            sizes.append(int(Path(file).read_text()))
    return min(sizes)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _git_revision() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=5, cwd=Path.cwd()
        )
    except (OSError, subprocess.SubprocessError):  # no git here: no revision
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def process_age() -> float:
    """Seconds since this process was started: the imports before the first line of ours count too."""
    ticks = float(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
