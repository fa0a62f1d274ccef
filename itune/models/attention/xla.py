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
    q_positions_BL: jax.Array | None = None,
    kv_positions_BS: jax.Array | None = None,
    offset: jax.Array | int = 0,
    window: int | None,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None = None,
    max_segments: int = 0,
    sinks_N: jax.Array | None = None,
    most_blocks: int = MAX_BLOCKS,
) -> jax.Array:
    """See `itune.models.attention.attention`; with an int `offset` no block reads keys after its last query."""
    del mesh, max_segments  # XLA partitions rows and heads by itself; for a shared sequence see context.py
    length, slots = query_BLNH.shape[1], key_BSKH.shape[1]
    long = isinstance(offset, int) and slots >= LONG
    rows = query_BLNH, key_BSKH, value_BSKH, q_segments_BL, kv_segments_BS
    arrays = *rows, q_positions_BL, kv_positions_BS, offset, sinks_N
    blocks = []
    for start, stop in _blocks(length, most_blocks):
        first, last = 0, slots
        if isinstance(offset, int):
            last = min(offset + stop, slots)
            first = max(0, offset + start - window + 1) if window is not None and q_positions_BL is None else 0
        cut = slice(start, stop), slice(first, last)
        block = functools.partial(_block, cut=cut, window=window, scale=scale, softcap=softcap)
        # the cut is inside the checkpoint, so that whole keys and values are kept once and not a piece a block
        blocks.append(jax.checkpoint(block)(*arrays) if long else block(*arrays))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _blocks(length: int, most: int = MAX_BLOCKS) -> list[tuple[int, int]]:
    size = BLOCK * -(-length // (BLOCK * most))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _block(
    query, key, value, q_segments, kv_segments, q_positions, kv_positions, offset, sinks, *, cut, window, scale, softcap
):
    """Attention of one block of queries over its keys, (B, block, N, H); `cut` is (slice of queries, slice of keys)."""
    queries, keys = cut
    query_BLNH, key_BSKH, value_BSKH = query[:, queries], key[:, keys], value[:, keys]
    batch, length, heads, head_dim = query_BLNH.shape
    kv_heads = key_BSKH.shape[2]
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    query_BLKGH = query_BLNH.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = _scores(query_BLKGH, key_BSKH, precision) * scale
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    same_BLS = q_segments[:, queries, None] == kv_segments[:, None, keys]
    slots_L, slots_S = jnp.arange(queries.start, queries.stop) + offset, jnp.arange(keys.start, keys.stop)
    distance = slots_L[None, :, None] - slots_S[None, None, :]
    visible_BLS = same_BLS & (kv_segments[:, None, keys] != 0) & (distance >= 0)
    if window is not None:
        if q_positions is not None:
            distance = q_positions[:, queries, None] - kv_positions[:, None, keys]
        visible_BLS = visible_BLS & (distance < window)
    # a large finite number, so that a row without visible keys has a finite softmax and a finite gradient
    scores = jnp.where(visible_BLS[:, None, None], scores, jnp.finfo(jnp.float32).min)
    if sinks is not None:
        sinks_KG11 = sinks.astype(jnp.float32).reshape(kv_heads, heads // kv_heads, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks_KG11, (*scores.shape[:-1], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : value_BSKH.shape[1]].astype(value.dtype)
    mixed = _mixed(weights, value_BSKH, precision)
    return mixed.reshape(batch, length, heads, head_dim)


def _scores(query_BLKGH, key_BSKH, precision):
    """Products of queries and keys, float32 (B, K, G, L, S)."""
    product = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    if not _by_head(query_BLKGH.shape[1]):
        return product("blkgh,bskh->bkgls", query_BLKGH, key_BSKH)
    heads = [product("bkh,bskh->bks", query_BLKGH[:, 0, :, g], key_BSKH) for g in range(query_BLKGH.shape[3])]
    return jnp.stack(heads, axis=2)[:, :, :, None]


def _mixed(weights_BKGLS, value_BSKH, precision):
    """Values mixed by their weights, (B, L, K, G, H)."""
    product = functools.partial(jnp.einsum, precision=precision)
    if not _by_head(weights_BKGLS.shape[3]):
        return product("bkgls,bskh->blkgh", weights_BKGLS, value_BSKH)
    heads = [product("bks,bskh->bkh", weights_BKGLS[:, :, g, 0], value_BSKH) for g in range(weights_BKGLS.shape[2])]
    return jnp.stack(heads, axis=2)[:, None]


def _by_head(length: int) -> bool:
    """Whether to multiply head by head: a decode step on CPU.

    There a vector times a matrix is compiled in place; for the few query heads of a group XLA calls a library, once a
    key head and row, which costs several times the product.
    """
    return length == 1 and jax.default_backend() == "cpu"
