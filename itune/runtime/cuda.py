"""JAX's CUDA plugin on a machine without an NVIDIA GPU, where it is installed for its compiler: `itune plan`."""

from __future__ import annotations

import importlib.util
import os
import types
from pathlib import Path

PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
# of the GPU's memory; jax would take 0.75, and a run that `itune plan` says fits would not. The rest is for what
# allocates beside jax: the driver, NCCL, cuBLAS
MEMORY_SHARE = 0.9
MEMORY_SETTINGS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the second is the older name
CUDNN = 91000  # the version that a GPU's machine is taken to have, 9.10


def compiler_here() -> bool:
    """Whether the CUDA plugin is installed: it compiles for GPUs that need not be there, without any CUDA library."""
    return importlib.util.find_spec("jax_plugins") is not None and any(map(importlib.util.find_spec, PLUGINS))


def gpu_here() -> bool:
    """Whether this machine shows an NVIDIA GPU (under WSL, whichever it is)."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()


def set_up_jax() -> None:
    """Let a GPU's memory be used, and where there is none keep the plugin from printing that CUDA is absent.

    What the environment says already stays. Before the first use of a device.
    """
    take_memory(MEMORY_SHARE)
    if not gpu_here():
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")


def take_memory(share: float) -> None:
    """Have jax take this share of a GPU's memory, unless the environment says another."""
    if not any(name in os.environ for name in MEMORY_SETTINGS):  # jax refuses to have both
        os.environ[MEMORY_SETTINGS[0]] = str(share)


def only_compiles(capability: str) -> None:
    """Answer for a GPU of this compute capability, such as "9.0", what JAX asks of the one it would run on.

    Holds for the rest of the process, which must be one that only compiles. JAX's rules for cuDNN's attention and for
    Pallas have no public way to name a GPU that is not there.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn
    from jax._src.pallas.triton import pallas_call_registration as pallas

    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    major, minor = map(int, capability.split("."))

    def at_least(wanted: str) -> bool:
        return (major, minor) >= tuple(map(int, wanted.split(".")))

    answers = {
        "cuda_versions": types.SimpleNamespace(cudnn_get_version=lambda: CUDNN),
        "check_compute_capability": at_least,
        "is_cuda_compute_capability_equal": lambda wanted: wanted == capability,
    }
    for name, answer in answers.items():
        setattr(cudnn, name, answer)
    if hasattr(pallas, "gpu_info_lib"):  # jax 0.11; before, a GPU that is not there counts as 9.0
        info = pallas.gpu_info_lib.GpuInfo(
            gpu_version=None, arch_name=capability, compute_capability=10 * major + minor
        )
        pallas.gpu_info_lib.get_gpu_info = lambda: info
