"""The KV cache: static shapes, one slot a token, the same slot for every row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from itune.models.architecture import ModelConfig, layer_plan
from itune.sharding import constrain

KV_AXES = ("batch", None, "kv_heads", None)


def init_cache(config: ModelConfig, batch: int, length: int, dtype: str, mesh: Mesh | None = None) -> dict[str, Any]:
    """An empty cache of `length` slots: segments 0 everywhere, so nothing in it is ever attended.

    {"index": next free slot, "segments", "positions": (B, S) int32, "blocks": one {"key", "value"} (R, B, S, K, H) a
    layer of the repeating block, "rest": one (B, S, K, H) pair a layer of the remainder}.
    """
    period, repeats = layer_plan(config.kinds)
    shape = (batch, length, config.num_kv_heads, config.head_dim)

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
    return {
        "key": jax.lax.dynamic_update_slice_in_dim(cache["key"], key_BLKH.astype(cache["key"].dtype), index, axis=1),
        "value": jax.lax.dynamic_update_slice_in_dim(
            cache["value"], value_BLKH.astype(cache["value"].dtype), index, axis=1
        ),
    }
