"""Stochastic rounding of float32 to bfloat16: up or down with the probabilities that make the mean exact.

A bfloat16 weight has 8 bits of mantissa: an update below 1 / 512 of it is lost when it is rounded to nearest, always.
Rounded at random it arrives on average (Gupta et al., arXiv 1502.02551; for large models Zamirai et al., 2010.06192).
"""

from __future__ import annotations

import zlib
from typing import Any

import jax
import jax.numpy as jnp


def round_stochastically(x: jax.Array, seed: Any) -> jax.Array:
    """float32 -> bfloat16: 16 random bits are added below the mantissa that stays, then what lies below it is cut off.

    The result is one of the two neighbours, each with the probability of the other's distance; a value that bfloat16
    holds stays. `seed`: a uint32 scalar; the bits follow from it and an entry's place, on any mesh. Infinities and NaN
    pass through.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    cut = (bits + (random_bits(x.shape, seed) >> 16)) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(jnp.where(jnp.isfinite(x), cut, bits), jnp.float32).astype(jnp.bfloat16)


def round_tree(tree: Any, dtypes: Any, seed: Any) -> Any:
    """Each float32 leaf in the dtype of its twin in `dtypes`: to bfloat16 stochastically, by the seed and its path."""

    def one(path: Any, x: jax.Array, twin: Any) -> jax.Array:
        if twin.dtype != jnp.bfloat16:
            return x.astype(twin.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return round_stochastically(x.astype(jnp.float32), _mix(seed ^ jnp.uint32(zlib.crc32(name.encode()))))

    return jax.tree_util.tree_map_with_path(one, tree, dtypes)


def random_bits(shape: tuple[int, ...], seed: Any) -> jax.Array:
    """uint32 of this shape: a hash of the seed and the place. A few integer operations an entry, where threefry takes a
    hundred and, on some devices, memory of its own."""
    x = jnp.asarray(seed, jnp.uint32)
    for axis, size in enumerate(shape):
        place = jnp.arange(size, dtype=jnp.uint32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        x = _mix(x + place * jnp.uint32(0x9E3779B9) + jnp.uint32(axis + 1))
    return jnp.broadcast_to(x, shape)


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which every bit depends on every other (C. Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
