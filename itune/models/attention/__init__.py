"""One attention function; a file per backend. Which backend runs is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jax.sharding import Mesh

from itune.models.attention import xla
from itune.types import InputError

# name in `model.attention` -> function with the keyword arguments of `attention`, less `backend`
BACKENDS: dict[str, Callable[..., jax.Array]] = {"xla": xla.attention}


def choose_backend(backend: str, **_: object) -> str:
    """The backend that runs: the one asked for, or for "auto" the best one that this device and these shapes allow."""
    if backend == "auto":
        return "xla"
    if backend not in BACKENDS:
        raise InputError(f"model.attention: {backend!r} is not available here; available: auto, {', '.join(BACKENDS)}")
    return backend


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
    scale: float | None = None,
    softcap: float | None = None,
    backend: str = "auto",
    mesh: Mesh | None = None,
) -> jax.Array:
    """Causal grouped-query attention inside segments -> (B, L, N, H) in the query's dtype.

    Query l stands in slot `offset + l` of the S key slots (an int 0 with L == S is self-attention over whole rows). It
    sees the keys in slots up to its own whose segment equals its own and is not 0, and of those the last `window`,
    itself included. Distances for the window are counted in slots, or in positions where those are given (a KV cache
    with padding inside a row). `scale` defaults to 1/sqrt(H); `softcap` c turns scores s into c * tanh(s / c). A query
    that sees nothing (padding) gets some finite vector. Softmax in float32.
    """
    name = choose_backend(backend, query_BLNH=query_BLNH, key_BSKH=key_BSKH, offset=offset, softcap=softcap, mesh=mesh)
    return BACKENDS[name](
        query_BLNH,
        key_BSKH,
        value_BSKH,
        q_segments_BL=q_segments_BL,
        kv_segments_BS=kv_segments_BS,
        q_positions_BL=q_positions_BL,
        kv_positions_BS=kv_positions_BS,
        offset=offset,
        window=window,
        scale=query_BLNH.shape[-1] ** -0.5 if scale is None else scale,
        softcap=softcap,
        mesh=mesh,
    )
