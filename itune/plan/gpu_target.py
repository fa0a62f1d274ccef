"""NVIDIA GPUs as XLA's compiler is told of them, one host at a time: `itune plan` where none is at hand.

Multiprocessors, caches and limits: NVIDIA's data sheets (A100, H100 SXM, H200) and the table of compute capabilities in
the CUDA programming guide. XLA fuses, rematerialises and schedules by these; it times nothing, where a machine with the
GPU tries several kernels for a product. Nor does it ask cuDNN for the working memory of attention: see `cudnn_memory`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from itune.models.attention import SHORT, gpu
from itune.plan.chips import Chip, Slice
from itune.plan.hlo import arrays, computations
from itune.plan.layout import Layout
from itune.runtime.cuda import CUDNN, MEMORY_SHARE, only_compiles

KIB = 2**10
HOPPER = "9.0"  # the compute capability from which on cuDNN takes packed rows


@dataclasses.dataclass(frozen=True)
class Target:
    """`capability`: the compute capability; `cores`: multiprocessors of `lanes` float32 units at `clock` GHz.

    `shared` and `shared_block`: bytes of shared memory of a multiprocessor, and of one block that asks for the most.
    """

    capability: str
    cores: int
    lanes: int
    clock: float
    l2: int
    shared: int
    shared_block: int


_HOPPER = Target(HOPPER, 132, 128, 1.98, 50 * KIB**2, 228 * KIB, 227 * KIB)
TARGETS = {
    "a100": Target("8.0", 108, 64, 1.41, 40 * KIB**2, 164 * KIB, 163 * KIB),
    "h100": _HOPPER,
    "h200": _HOPPER,
}


def cudnn_formula(layout: Layout, chip: Chip, segments: int) -> int:
    """The same as `cudnn_memory` before anything is compiled: `segments` a row at most, 0 where nobody knows."""
    config, m = layout.config, layout.model.config
    target, length = TARGETS.get(chip.name), config.data.max_length
    if target is None or float(target.capability) < float(HOPPER) or config.model.attention not in ("auto", "cudnn"):
        return 0
    shapes = ((1, length, heads, m.head_dim) for heads in (m.num_heads, m.num_kv_heads))
    query, key = (jax.ShapeDtypeStruct(shape, config.model.compute_dtype) for shape in shapes)
    options = {"window": None, "softcap": m.attention_softcap, "mesh": layout.model.mesh}
    if m.sinks or length < SHORT or not layout.through or gpu.unfit("cudnn", query, key, **options):
        return 0
    most = min(segments or gpu.MAX_SEGMENTS, length)
    return 4 * layout.tokens * most * m.num_heads // layout.sizes["tensor"] * m.head_dim


def gpu_devices(where: Slice) -> list[Any]:
    """Stand-ins for the GPUs of one host. JAX in this process answers for them from now on."""
    from jax.experimental import topologies

    only_compiles(TARGETS[where.chip.name].capability)
    shape = f"1x1x{where.chips}"  # NVLink domains, hosts, GPUs of one
    described = described_to_xla(where.chip, TARGETS[where.chip.name])
    return list(topologies.get_topology_desc(shape, "cuda", topology=shape, target_config=described).devices)


def described_to_xla(chip: Chip, target: Target) -> str:
    """The text form of XLA's GpuTargetConfigProto."""
    major, minor = target.capability.split(".")
    return f"""
    gpu_device_info {{
      threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
      block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
      registers_per_core_limit: 65536  registers_per_block_limit: 65536
      shared_memory_per_block: {48 * KIB}  shared_memory_per_core: {target.shared}
      shared_memory_per_block_optin: {target.shared_block}
      core_count: {target.cores}  fpus_per_core: {target.lanes}  clock_rate_ghz: {target.clock}
      memory_bandwidth: {int(chip.memory_bandwidth)}  l2_cache_size: {target.l2}
      device_memory_size: {int(chip.memory / MEMORY_SHARE)}
      cuda_compute_capability {{ major: {major}  minor: {minor} }}
    }}
    platform_name: "CUDA"
    dnn_version_info {{ major: {CUDNN // 10000}  minor: {CUDNN // 100 % 100}  patch: 0 }}
    device_description_str: "{chip.kind}"
    """


def cudnn_memory(text: str) -> int:
    """Bytes that cuDNN takes for the backward pass of attention in a compiled program, 0 where it has none.

    An estimate: gradients of the queries in float32, once for each segment that a row may have. With it, peaks measured
    on an H200 were found again within 5 %, with and without packed rows (benchmarks/RESULTS_GPU.md).
    """
    found = [0]
    for instruction in (each for body in computations(text).values() for each in body):
        if "__cudnn$fmhaSoftmaxBackward" not in instruction.rest:
            continue
        operands = list(arrays(instruction.rest.partition("operand_layout_constraints={")[2]))
        query = operands[0][1]  # (rows, tokens, heads, width)
        statistics = next(dims for dtype, dims in operands if dtype == "f32")  # (rows x segments, heads, tokens)
        found.append(4 * math.prod(statistics) * query[-1])
    return max(found)
