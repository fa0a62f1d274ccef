"""Splash attention on TPU: flash attention in Pallas that skips the blocks which causality or the window hides.

Kernel: `jax.experimental.pallas.ops.tpu.splash_attention`. It sees one device's rows and heads, so it runs under
`shard_map`: rows over data and fsdp, heads over tensor, queries over context (keys are gathered there).
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itune.models.attention.context import divisible_heads
from itune.models.remat import KEPT
from itune.sharding import RULES, rows_divisor
from itune.types import InputError

LANES = 128
# Block length by device kind, for heads of up to 256 bytes (128 channels in bfloat16). Larger blocks read the keys
# fewer times; VMEM bounds them: by ahead-of-time compilation 2048 overflows on v5e and v5p, and with wide heads on v6e.
# None has been timed on a device yet.
BLOCKS = {"TPU v5 lite": 512, "TPU v5": 1024, "TPU v6 lite": 1024}
DEFAULT_BLOCK = 512


def attention(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    q_segments_BL: jax.Array,
    kv_segments_BS: jax.Array,
    q_positions_BL: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    offset: jax.Array | int = 0,
    window: int | None = None,
    scale: float,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    max_segments: int = 0,
    block: int | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `itune.models.attention.attention`; only self-attention over whole rows (`unsupported` says when not).

    `block` overrides the block length; `interpret` runs the kernel on any device, slowly, for tests. Padding
    (segment 0) attends to padding, which is finite and reaches no loss.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # imports Pallas, which costs time

    del q_positions_BL, kv_positions_BS, offset, max_segments
    length, heads = query_BLNH.shape[1], query_BLNH.shape[2]
    rows, tensor, context = _layout(mesh, query_BLNH.shape[0], heads)
    key_BSKH, value_BSKH = (divisible_heads(x, tensor) for x in (key_BSKH, value_BSKH))
    block = min(block or _block(mesh, query_BLNH), _round_up(-(-length // context), LANES))
    pad = _round_up(length, block * context) - length
    kernel = _kernel(heads, length + pad, window, softcap, block, tensor, context, interpret)

    def inner(kernel, query_BNLH, key_BKSH, value_BKSH, q_segments_BL, kv_segments_BS):
        segments = splash.SegmentIds(q_segments_BL, kv_segments_BS)
        return jax.vmap(kernel)(query_BNLH, key_BKSH, value_BKSH, segments)

    if mesh is not None:
        queries, keys = PartitionSpec(rows, "tensor", "context"), PartitionSpec(rows, "tensor")
        inner = jax.shard_map(
            inner,
            mesh=mesh,
            in_specs=(
                kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec("tensor", "context"))),
                *(queries, keys, keys),
                *(PartitionSpec(rows, "context"), PartitionSpec(rows)),
            ),
            out_specs=queries,
            check_vma=False,  # the kernel's outputs carry no types of varying axes
        )
    # the kernel has no scale of its own
    query_BLNH = (query_BLNH.astype(jnp.float32) * scale).astype(query_BLNH.dtype)
    arrays = (query_BLNH, key_BSKH, value_BSKH)
    by_head = [jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))).swapaxes(1, 2) for x in arrays]
    segments = [jnp.pad(x, ((0, 0), (0, pad))) for x in (q_segments_BL, kv_segments_BS)]
    return inner(kernel, *by_head, *segments).swapaxes(1, 2)[:, :length]


def unsupported(query: Any, key: Any, *, window: int | None, softcap: float | None, mesh: Mesh | None) -> str:
    """Why the kernel cannot run on these shapes (arrays or ShapeDtypeStructs), or "" if it can."""
    del key, window, softcap, mesh
    if query.dtype == jnp.float32:
        return "its products round float32 to bfloat16"
    return ""


def _kernel(heads, length, window, softcap, block, tensor, context, interpret):
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    shape = (length, length)
    mask: Any = splash.CausalMask(shape, shard_count=context)
    if window is not None:
        mask = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0, shard_count=context)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        use_fused_bwd_kernel=True,
    )
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=tensor,
        q_seq_shards=context,
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )


def _layout(mesh: Mesh | None, batch: int, heads: int) -> tuple[tuple[str, ...] | None, int, int]:
    """(mesh axes of the rows, devices that share the heads, devices that share a sequence)."""
    if mesh is None:
        return None, 1, 1
    tensor = mesh.shape["tensor"]
    if heads % tensor:
        raise InputError(f"mesh.tensor={tensor} does not divide the model's {heads} query heads; choose a divisor")
    # a batch that the mesh does not divide (a single prompt) is computed whole on every device
    return (RULES["batch"] if batch % rows_divisor(mesh) == 0 else None), tensor, mesh.shape["context"]


def _block(mesh: Mesh | None, query_BLNH: jax.Array) -> int:
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    block = BLOCKS.get(device.device_kind, DEFAULT_BLOCK)
    return block if query_BLNH.shape[-1] * query_BLNH.dtype.itemsize <= 256 else block // 2


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple
