"""Kernels of one layer of a scan, kept as they are stored, on GPUs that divide their inputs (fsdp).

NCCL gathers along the outermost dimension. XLA turns a shard (out, in / fsdp) over for that, and since layouts travel
from operation to operation, it does so outside the scan: a second copy of the weights of all layers, and one of their
gradients. Behind a flat view and a barrier the turning stays in the layer, where it costs nothing beside the rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from itune.models.layers import AXES
from itune.sharding import RULES, platform, spec


def row_major(layer_class: Any, mesh: Mesh | None) -> Any:
    """The layer, reading its kernels that way where the mesh asks for it. Not for a layer that is being initialised."""
    if mesh is None or mesh.shape["fsdp"] == 1 or platform(mesh) != "gpu":
        return layer_class
    return nn.map_variables(layer_class, "params", trans_in_fn=functools.partial(_kept, mesh))


def _kept(mesh: Mesh, params: Any) -> Any:
    def one(path: Any, kernel: jax.Array) -> jax.Array:
        names = AXES.get(tuple(entry.key for entry in path[-2:]), ())
        if len(names) != kernel.ndim or len(names) < 2 or RULES[names[-1]] != ("fsdp",):
            return kernel
        as_stored = jax.shard_map(_flat_for_a_moment, mesh=mesh, in_specs=spec(names), out_specs=spec(names))
        return as_stored(kernel)

    return jax.tree_util.tree_map_with_path(one, params)


def _flat_for_a_moment(shard: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(shard.reshape(-1)).reshape(shard.shape)
