"""What the numbers were measured on, and whether it had anything else to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path

IDLE = 0.5  # load at which a machine counts as idle
LIBRARIES = ("jax", "torch", "transformers", "trl", "tokenizers", "datasets", "orbax-checkpoint")


def load(seconds: float = 2.0) -> float:
    """Cores that were busy over the last `seconds`: the load average still counts what has just ended."""
    def busy() -> float:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


def describe() -> dict[str, str]:
    """Hardware and versions."""
    info = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":", 1)[1].strip() for line in info.splitlines() if line.startswith("model name")), "?")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) / 1e6
    found = {"cpu": f"{os.cpu_count()} cores, {name}, {memory:.0f} GB", "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "none"
    return found
