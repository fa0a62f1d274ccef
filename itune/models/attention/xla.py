"""Attention in plain XLA: the reference on every device, and the fastest on CPU.

Rows are cut into query blocks, and each block reads only the keys that it may see: about half the work of a full
square, and never L x L scores at one time.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

BLOCK = 128  # queries at a time
MAX_BLOCKS = 16  # blocks are unrolled: longer rows get larger blocks, so that compile time stays bounded
LONG = 1024  # from this length on the backward pass recomputes a block's scores, so that no square is kept either


def attention(
    query_BLNH: jax.Array,
    key_BSKH: jax.Array,
    value_BSKH: jax.Array,
    *,
    q_segments_BL: jax.Array,
    kv_segments_BS: jax.Array,
    q_positions_BL: jax.Array | None,
    kv_positions_BS: jax.Array | None,
    offset: jax.Array | int,
    window: int | None,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None,
    max_segments: int = 0,
) -> jax.Array:
    """See `itune.models.attention.attention`."""
    del mesh, max_segments  # XLA partitions this by itself
    length, slots = query_BLNH.shape[1], key_BSKH.shape[1]
    aligned = isinstance(offset, int) and offset == 0 and length == slots
    attend = functools.partial(_block, window=window, scale=scale, softcap=softcap)
    block = jax.checkpoint(attend) if length >= LONG else attend
    blocks = []
    for start, stop in _blocks(length):
        first = max(0, start - window + 1) if aligned and window is not None and q_positions_BL is None else 0
        last = stop if aligned else slots
        blocks.append(
            block(
                query_BLNH[:, start:stop],
                key_BSKH[:, first:last],
                value_BSKH[:, first:last],
                (q_segments_BL[:, start:stop], kv_segments_BS[:, first:last]),
                (jnp.arange(start, stop) + offset, jnp.arange(first, last)),
                _cut(q_positions_BL, kv_positions_BS, (start, stop), (first, last)),
            )
        )
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _cut(q_positions_BL, kv_positions_BS, queries, keys):
    """The block's positions, where positions are given."""
    if q_positions_BL is None or kv_positions_BS is None:
        return None
    return q_positions_BL[:, slice(*queries)], kv_positions_BS[:, slice(*keys)]


def _blocks(length: int) -> list[tuple[int, int]]:
    size = BLOCK * -(-length // (BLOCK * MAX_BLOCKS))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _block(query_BLNH, key_BSKH, value_BSKH, segments, slots, positions, *, window, scale, softcap):
    """Attention of one block of queries over its keys; `segments`, `slots`, `positions` are (queries, keys) pairs."""
    batch, length, heads, head_dim = query_BLNH.shape
    kv_heads = key_BSKH.shape[2]
    precision = jax.lax.Precision.HIGHEST if query_BLNH.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    query_BLKGH = query_BLNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum(
        "blkgh,bskh->bkgls", query_BLKGH, key_BSKH, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    visible_BLS = _visible(segments, slots, positions, window)
    # a large finite number, so that a row without visible keys has a finite softmax and a finite gradient
    scores = jnp.where(visible_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value_BSKH.dtype)
    mixed = jnp.einsum("bkgls,bskh->blkgh", weights, value_BSKH, precision=precision)
    return mixed.reshape(batch, length, heads, head_dim)


def _visible(segments, slots, positions, window):
    """Boolean (B, L, S): which keys each query sees."""
    q_segments_BL, kv_segments_BS = segments
    q_slots_L, kv_slots_S = slots
    same = (q_segments_BL[:, :, None] == kv_segments_BS[:, None, :]) & (kv_segments_BS[:, None, :] != 0)
    visible = same & (kv_slots_S[None, None, :] <= q_slots_L[None, :, None])
    if window is None:
        return visible
    if positions is not None:
        q_positions_BL, kv_positions_BS = positions
        return visible & (q_positions_BL[:, :, None] - kv_positions_BS[:, None, :] < window)
    return visible & (q_slots_L[None, :, None] - kv_slots_S[None, None, :] < window)
