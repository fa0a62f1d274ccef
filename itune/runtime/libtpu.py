"""libtpu on a machine without a TPU, where it is installed for its compiler: `itune plan`."""

from __future__ import annotations

import importlib.util
import os

# libtpu asks the cloud's metadata server, for minutes, what machine it is on, unless it is told
SETTINGS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def quiet_without_tpu() -> None:
    """Where no TPU is attached, keep libtpu from printing that it found none. Before the first use of a device."""
    if os.environ.get("JAX_PLATFORMS") or importlib.util.find_spec("libtpu") is None:
        return
    import jax  # noqa: F401  # sets TPU_SKIP_MDS_QUERY where the PCI bus has no TPU

    if os.environ.get("TPU_SKIP_MDS_QUERY") == "1":
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
