"""Causal attention for one CPU device: blocks of queries over the key blocks that they may see, never a whole square.

For each row and block of queries a loop runs from the block in which the first of its segments begins to its own: in a
packed row that is about the length of an example, whatever the length of the row. Softmax is kept as a running maximum
and sum, and the backward pass recomputes a block's scores from them (FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from itune.models.layers import precision
from itune.models.remat import keep

BLOCK = 64  # queries, and keys, at a time: two thirds of the time that 128 take, and less is hidden in packed rows
SHORTEST = 256  # tokens of a row
HIDDEN = -1e30  # score of a key that a query may not see


class _Static(NamedTuple):
    per_row: int  # blocks a row
    group: int  # query heads a key head
    window: int | None
    scale: float
    softcap: float | None


def unsupported(query: Any, key: Any, *, window: int | None, softcap: float | None, mesh: Mesh | None) -> str:
    """Why this cannot run, "" where it can. Of short rows the plain product is as good."""
    del key, window, softcap
    if mesh is not None and mesh.devices.size > 1:
        return "it computes on one device"
    return "" if query.shape[1] >= SHORTEST else f"rows are shorter than {SHORTEST}"


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
    """See `itune.models.attention.attention`; whole rows only."""
    del kv_segments_BS, q_positions_BL, kv_positions_BS, offset, mesh, max_segments
    batch, length, heads, head_dim = query_BLNH.shape
    kv_heads = key_BSKH.shape[2]
    per_row = -(-length // BLOCK)
    static = _Static(per_row, heads // kv_heads, window, scale, softcap)

    def blocks(x_BL: jax.Array) -> jax.Array:
        padded = jnp.pad(x_BL, [(0, 0), (0, per_row * BLOCK - length)] + [(0, 0)] * (x_BL.ndim - 2))
        return padded.reshape(batch * per_row, BLOCK, *x_BL.shape[2:])

    # P is a block of a row, R the queries of a block times the query heads of a key head: one product for all of them
    query_PSKGH = blocks(query_BLNH).reshape(-1, BLOCK, kv_heads, heads // kv_heads, head_dim)
    query_PKRH = query_PSKGH.transpose(0, 2, 3, 1, 4).reshape(batch * per_row, kv_heads, -1, head_dim)
    key_PKSH, value_PKSH = (blocks(x).transpose(0, 2, 1, 3) for x in (key_BSKH, value_BSKH))
    segments_PS = blocks(q_segments_BL)
    first_P = _first_blocks(static, segments_PS)
    mixed_PKRH = _attend(static, query_PKRH, key_PKSH, value_PKSH, segments_PS, first_P)
    mixed = mixed_PKRH.reshape(batch, per_row, kv_heads, heads // kv_heads, BLOCK, head_dim)
    mixed = mixed.transpose(0, 1, 4, 2, 3, 5).reshape(batch, per_row * BLOCK, heads, head_dim)
    return mixed[:, :length]


def _first_blocks(static: _Static, segments_PS: jax.Array) -> jax.Array:
    """int32 (P,): the first block of the row that shares a segment with this one, or that the window reaches."""
    low_PS = jnp.where(segments_PS > 0, segments_PS, jnp.iinfo(jnp.int32).max)
    low, high = low_PS.min(1).reshape(-1, static.per_row), segments_PS.max(1).reshape(-1, static.per_row)
    place = jnp.arange(static.per_row)
    shared = (low[:, None, :] <= high[:, :, None]) & (high[:, None, :] >= low[:, :, None])
    shared &= place[None, None, :] <= place[None, :, None]
    first = jnp.where(shared.any(-1), jnp.argmax(shared, axis=-1), place)  # a block of padding reads itself alone
    if static.window is not None:
        first = jnp.maximum(first, (place * BLOCK - static.window + 1) // BLOCK)
    return first.reshape(-1).astype(jnp.int32)


def _scores(static: _Static, pair: Any, query_KRH: Any, key_KSH: Any, segments_S: Any, keys_S: Any, block: Any) -> Any:
    """(scores (K, G, S, S) float32 before the mask, the mask (S, S)) of the queries of `pair` and the keys of `block`,
    both counted over all rows."""
    product = functools.partial(jnp.einsum, precision=precision(query_KRH.dtype), preferred_element_type=jnp.float32)
    scores = product("krh,ksh->krs", query_KRH, key_KSH) * static.scale
    if static.softcap is not None:
        scores = static.softcap * jnp.tanh(scores / static.softcap)
    inside = jnp.arange(BLOCK)
    distance = (pair - block) * BLOCK + inside[:, None] - inside[None, :]
    visible = (distance >= 0) & (segments_S[:, None] == keys_S[None, :]) & (keys_S != 0)[None, :]
    if static.window is not None:
        visible &= distance < static.window
    return scores.reshape(scores.shape[0], static.group, BLOCK, BLOCK), visible


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, query_PKRH: Any, key_PKSH: Any, value_PKSH: Any, segments_PS: Any, first_P: Any) -> Any:
    return _forward(static, query_PKRH, key_PKSH, value_PKSH, segments_PS, first_P)[0]


def _forward(static: _Static, query_PKRH: Any, key_PKSH: Any, value_PKSH: Any, segments_PS: Any, first_P: Any) -> Any:
    kv_heads, rows, head_dim = query_PKRH.shape[1:]
    product = functools.partial(jnp.einsum, precision=precision(query_PKRH.dtype), preferred_element_type=jnp.float32)

    def one(_: None, given: Any) -> Any:
        pair, query_KRH, segments_S, first = given
        start = pair - pair % static.per_row

        def turn(block: Any, carry: Any) -> Any:
            most_KR, sum_KR, mixed_KRH = carry
            scores, visible = _scores(static, pair, query_KRH, key_PKSH[block], segments_S, segments_PS[block], block)
            scores_KRS = jnp.where(visible, scores, HIDDEN).reshape(kv_heads, rows, BLOCK)
            new_KR = jnp.maximum(most_KR, scores_KRS.max(-1))
            weights_KRS = jnp.exp(scores_KRS - new_KR[..., None])
            kept_KR = jnp.exp(most_KR - new_KR)
            mixed_KRH = mixed_KRH * kept_KR[..., None] + product(
                "krs,ksh->krh", weights_KRS.astype(value_PKSH.dtype), value_PKSH[block]
            )
            return new_KR, sum_KR * kept_KR + weights_KRS.sum(-1), mixed_KRH

        nothing_KR = jnp.full((kv_heads, rows), HIDDEN, jnp.float32)
        carry = nothing_KR, jnp.zeros_like(nothing_KR), jnp.zeros((kv_heads, rows, head_dim), jnp.float32)
        most_KR, sum_KR, mixed_KRH = jax.lax.fori_loop(start + first, pair + 1, turn, carry)
        return None, ((mixed_KRH / sum_KR[..., None]).astype(query_PKRH.dtype), most_KR + jnp.log(sum_KR))

    given = (jnp.arange(len(first_P)), query_PKRH, segments_PS, first_P)
    mixed_PKRH, normaliser_PKR = map(keep, jax.lax.scan(one, None, given)[1])
    return mixed_PKRH, (query_PKRH, key_PKSH, value_PKSH, segments_PS, first_P, mixed_PKRH, normaliser_PKR)


def _backward(static: _Static, kept: Any, cotangent_PKRH: Any) -> Any:
    query_PKRH, key_PKSH, value_PKSH, segments_PS, first_P, mixed_PKRH, normaliser_PKR = kept
    kv_heads, rows, _ = query_PKRH.shape[1:]
    product = functools.partial(jnp.einsum, precision=precision(query_PKRH.dtype), preferred_element_type=jnp.float32)
    delta_PKR = jnp.sum(cotangent_PKRH.astype(jnp.float32) * mixed_PKRH.astype(jnp.float32), -1)

    def one(carry: Any, given: Any) -> Any:
        pair, query_KRH, cotangent_KRH, delta_KR, normaliser_KR, segments_S, first = given
        start = pair - pair % static.per_row

        def turn(block: Any, carry: Any) -> Any:
            dquery_KRH, dkey_PKSH, dvalue_PKSH = carry
            key_KSH, value_KSH = key_PKSH[block], value_PKSH[block]
            scores, visible = _scores(static, pair, query_KRH, key_KSH, segments_S, segments_PS[block], block)
            weights = jnp.where(visible, jnp.exp(scores - normaliser_KR.reshape(*scores.shape[:3], 1)), 0)
            weights_KRS = weights.reshape(kv_heads, rows, BLOCK).astype(query_KRH.dtype)
            dweights = product("krh,ksh->krs", cotangent_KRH, value_KSH).reshape(scores.shape)
            dscores = weights * (dweights - delta_KR.reshape(*scores.shape[:3], 1)) * static.scale
            if static.softcap is not None:
                dscores *= 1 - (scores / static.softcap) ** 2
            dscores_KRS = dscores.reshape(kv_heads, rows, BLOCK).astype(query_KRH.dtype)
            dquery_KRH += product("krs,ksh->krh", dscores_KRS, key_KSH)
            dkey_PKSH = dkey_PKSH.at[block].add(product("krs,krh->ksh", dscores_KRS, query_KRH))
            dvalue_PKSH = dvalue_PKSH.at[block].add(product("krs,krh->ksh", weights_KRS, cotangent_KRH))
            return dquery_KRH, dkey_PKSH, dvalue_PKSH

        zeros_KRH = jnp.zeros(query_KRH.shape, jnp.float32)
        dquery_KRH, *carry = jax.lax.fori_loop(start + first, pair + 1, turn, (zeros_KRH, *carry))
        return tuple(carry), dquery_KRH.astype(query_KRH.dtype)

    zeros_PKSH = jnp.zeros(key_PKSH.shape, jnp.float32)
    given = (
        jnp.arange(len(first_P)), query_PKRH, cotangent_PKRH, delta_PKR, normaliser_PKR, segments_PS, first_P,
    )  # fmt: skip
    (dkey_PKSH, dvalue_PKSH), dquery_PKRH = jax.lax.scan(one, (zeros_PKSH, zeros_PKSH), given)
    return dquery_PKRH, dkey_PKSH.astype(key_PKSH.dtype), dvalue_PKSH.astype(value_PKSH.dtype), None, None


_attend.defvjp(_forward, _backward)
