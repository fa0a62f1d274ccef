"""libtpu on a machine without a TPU, where it is installed for its compiler: `itune plan`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# libtpu asks the cloud's metadata server, for minutes, what machine it is on, unless it is told
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # compilers do not compete for a device
}


def only_compiles() -> None:
    """Tell libtpu what it would ask for; what the environment says already stays. Before libtpu is loaded."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def tpu_here() -> bool:
    """Whether jax will use TPU chips of this machine; whether they are part of a pod, jax asks the metadata server."""
    wanted = "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu").split(",")
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return wanted and chips and importlib.util.find_spec("libtpu") is not None


def quiet_without_tpu() -> None:
    """Where there is no TPU, keep libtpu from printing that it found none. Before the first use of a device."""
    if importlib.util.find_spec("libtpu") is not None and not tpu_here():
        only_compiles()
