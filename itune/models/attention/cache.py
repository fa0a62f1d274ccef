"""The KV cache: static shapes, one slot a token, the same slot for every row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from itune.models.architecture import ModelConfig, layer_plan
from itune.sharding import constrain

KV_AXES = ("batch", "kv_heads", None, None)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str, mesh: Mesh | None = None) -> dict[str, Any]:
    """An empty cache of `length` slots: segments 0 everywhere, so nothing in it is ever attended.

    {"index": next free slot, "segments", "positions": (B, S) int32, "blocks": one {"key", "value"} (R, B, K, S, H) a
    layer of the repeating block, "rest": one (B, K, S, H) pair a layer of the remainder}. Heads stand before slots,
    so that a decode step reads each head's keys in one sweep: on CPU five times faster than the other way round.
    """
    period, repeats = layer_plan(config.kinds)
    shape = (batch, config.num_kv_heads, length, config.head_dim)

    def pair(*stack: int) -> dict[str, jax.Array]:
        axes = (None,) * len(stack) + KV_AXES
        return {name: constrain(jnp.zeros((*stack, *shape), dtype), mesh, axes) for name in ("key", "value")}

    return {
        "index": jnp.zeros((), jnp.int32),
        "segments": jnp.zeros((batch, length), jnp.int32),
        "positions": jnp.zeros((batch, length), jnp.int32),
        "blocks": tuple(pair(repeats) for _ in range(period)),
        "rest": tuple(pair() for _ in range(config.num_layers - period * repeats)),
    }


def write(cache: dict[str, jax.Array], key_BLKH: jax.Array, value_BLKH: jax.Array, index: Any) -> dict[str, jax.Array]:
    """The layer's cache with these keys and values in slots index .. index + L."""
    new = {"key": key_BLKH, "value": value_BLKH}
    return {
        name: jax.lax.dynamic_update_slice_in_dim(old, new[name].swapaxes(1, 2).astype(old.dtype), index, axis=2)
        for name, old in cache.items()
    }


def read(cache: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """All keys and values of the layer's cache, (B, S, K, H)."""
    return cache["key"].swapaxes(1, 2), cache["value"].swapaxes(1, 2)
