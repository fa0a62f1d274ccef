"""Attention in XLA when a mesh's `context` axis shares each sequence.

Queries stay where their tokens are; keys and values, the smaller part under grouped heads, are gathered. A causal
order gives the last device far more keys to read than the first, so devices r and C-1-r exchange the second half of
their queries before, and the results after: then every device reads the same number of keys (zig-zag, as in
Zhu 2024, "ring flash attention"). Which keys those are is static for each device, so that no masked block is computed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from itune.models.attention import xla
from itune.sharding import RULES, rows_divisor

Branch = Callable[..., jax.Array]


def attention(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    q_segments_BL: jax.Array,
    kv_segments_BS: jax.Array,
    mesh: Mesh | None,
    sinks_N: jax.Array | None = None,
    q_positions_BL: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    offset: jax.Array | int = 0,
    window: int | None,
    scale: float,
    softcap: float | None,
    max_segments: int = 0,
) -> jax.Array:
    """See `itune.models.attention.attention`. Without a `context` axis, or not over whole rows, `xla.attention`."""
    del max_segments
    options: dict[str, Any] = {"window": window, "scale": scale, "softcap": softcap}
    (batch, length, heads, _), slots = query_BLNH.shape, key_BSKH.shape[1]
    aligned = isinstance(offset, int) and offset == 0 and length == slots and q_positions_BL is None
    devices = mesh.shape["context"] if mesh is not None else 1
    if mesh is None or devices == 1 or not aligned or length % devices:
        return xla.attention(
            query_BLNH, key_BSKH, value_BSKH, q_segments_BL=q_segments_BL, kv_segments_BS=kv_segments_BS,
            q_positions_BL=q_positions_BL, kv_positions_BS=kv_positions_BS, offset=offset, sinks_N=sinks_N, **options,
        )  # fmt: skip
    rows = RULES["batch"] if batch % rows_divisor(mesh) == 0 else None
    split = "tensor" if heads % mesh.shape["tensor"] == 0 else None
    if split:
        key_BSKH, value_BSKH = (divisible_heads(x, mesh.shape["tensor"]) for x in (key_BSKH, value_BSKH))
    by_head, by_token = PartitionSpec(rows, "context", split), PartitionSpec(rows, "context")
    sinks, sink_specs = ((), ()) if sinks_N is None else ((sinks_N,), (PartitionSpec(split),))
    # checkpoint: what waits for the backward pass is each device's own part, and keys and values are gathered again
    inner = jax.shard_map(
        jax.checkpoint(functools.partial(_shared, devices, options)),
        mesh=mesh,
        in_specs=(by_head, by_head, by_head, by_token, by_token, *sink_specs),
        out_specs=by_head,
        check_vma=False,  # a switch over the device's own number has no type of varying axes
    )
    return inner(query_BLNH, key_BSKH, value_BSKH, q_segments_BL, kv_segments_BS, *sinks)


def divisible_heads(x_BSKH: jax.Array, tensor: int) -> jax.Array:
    """Each key/value head repeated as often as it takes for `tensor` devices to get whole heads."""
    return jnp.repeat(x_BSKH, tensor // math.gcd(x_BSKH.shape[2], tensor), axis=2)


def _shared(devices, options, query_BLNH, key_BLKH, value_BLKH, q_segments_BL, kv_segments_BL, *sinks):
    """What one device computes: `_BL` are its own tokens, `_BS` those of the whole row."""
    length = query_BLNH.shape[1]
    gather = functools.partial(jax.lax.all_gather, axis_name="context", axis=1, tiled=True)
    key_BSKH, value_BSKH, kv_segments_BS = map(gather, (key_BLKH, value_BLKH, kv_segments_BL))
    chunks = 2 if length % 2 == 0 else 1  # an odd number of tokens cannot be halved: no exchange then
    chunk = length // chunks

    def exchange(x: jax.Array) -> jax.Array:
        if chunks == 1:
            return x
        swapped = jax.lax.ppermute(x[:, chunk:], "context", [(r, devices - 1 - r) for r in range(devices)])
        return jnp.concatenate([x[:, :chunk], swapped], axis=1)

    branches = []
    for r in range(devices):
        starts = (2 * r * chunk, (2 * (devices - r) - 1) * chunk)[:chunks] if chunks == 2 else (r * length,)
        branches.append(functools.partial(_chunks, starts=starts, chunk=chunk, devices=devices, **options))
    segments = exchange(q_segments_BL), kv_segments_BS
    arrays = exchange(query_BLNH), key_BSKH, value_BSKH, *sinks
    return exchange(_own_branch(tuple(branches), jax.lax.axis_index("context"), segments, arrays))


def _chunks(segments, arrays, *, starts, chunk, devices, **options):
    """Attention of the query chunks that begin at `starts` in the row."""
    (q_segments_BL, kv_segments_BS), (query_BLNH, key_BSKH, value_BSKH, *sinks) = segments, arrays
    outs = []
    for i, start in enumerate(starts):
        own = slice(i * chunk, (i + 1) * chunk)
        outs.append(
            xla.attention(
                query_BLNH[:, own], key_BSKH, value_BSKH, q_segments_BL=q_segments_BL[:, own],
                kv_segments_BS=kv_segments_BS, offset=start, sinks_N=sinks[0] if sinks else None,
                most_blocks=max(1, xla.MAX_BLOCKS // (len(starts) * devices)), **options,
            )
        )  # fmt: skip
    return jnp.concatenate(outs, axis=1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _own_branch(branches: tuple[Branch, ...], index: Any, segments: Any, arrays: Any) -> jax.Array:
    """`branches[index](segments, arrays)`. The backward pass chooses again, so that no device keeps the residuals of
    another's branch, which a plain switch would make room for."""
    return jax.lax.switch(index, branches, segments, arrays)


def _forward(branches: tuple[Branch, ...], index: Any, segments: Any, arrays: Any) -> Any:
    return _own_branch(branches, index, segments, arrays), (index, segments, arrays)


def _backward(branches: tuple[Branch, ...], kept: Any, cotangent: jax.Array) -> Any:
    def pulled(branch: Branch) -> Any:
        return lambda segments, arrays, cotangent: jax.vjp(functools.partial(branch, segments), arrays)[1](cotangent)[0]

    index, segments, arrays = kept
    return None, None, jax.lax.switch(index, [pulled(branch) for branch in branches], segments, arrays, cotangent)


_own_branch.defvjp(_forward, _backward)
