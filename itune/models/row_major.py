"""Kernels kept as they are stored, on GPUs that divide their inputs (fsdp).

NCCL gathers along the outermost dimension. XLA turns a shard (out, in / fsdp) over for that, and since layouts travel
from operation to operation, it does so outside the scan over layers: a second copy of the weights of all layers, and
one of their gradients. Behind a flat view and a barrier the turning stays in the layer, beside the cast of its kernel.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jax.sharding import Mesh, PartitionSpec

from itune.sharding import RULES, platform, spec


class Stored(NamedTuple):
    """Where a kernel lies that is to be kept as it is stored."""

    mesh: Mesh
    spec: PartitionSpec


def stored_on(mesh: Mesh | None, names: tuple[str, ...]) -> Stored | None:
    """For a kernel with these logical axes; None where the devices ask for nothing."""
    if mesh is None or mesh.shape["fsdp"] == 1 or RULES[names[-1]] != ("fsdp",) or platform(mesh) != "gpu":
        return None
    return Stored(mesh, spec(names))


def as_stored(how: Stored | None, kernel: jax.Array) -> jax.Array:
    """The kernel, or its gradient, with its shards laid out row by row at this place of the program."""
    if how is None:
        return kernel
    return jax.shard_map(_flat_for_a_moment, mesh=how.mesh, in_specs=how.spec, out_specs=how.spec)(kernel)


def _flat_for_a_moment(shard: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(shard.reshape(-1)).reshape(shard.shape)
