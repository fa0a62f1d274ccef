"""Rows of the embedding on a mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from itune.sharding import axis_size, spec


def lookup(embedding_VD: jax.Array, tokens_BL: jax.Array, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """Rows of the embedding, (B, L, D) in `dtype`.

    With copies of the weights (mesh axis `data`) each device looks up the tokens of its copy in its part of the table,
    and the gradients of the copies' tables are summed. Left to itself XLA gathers the gradients of all copies' rows
    instead: hidden states of all tokens; jax 0.12 does so too where both axes of the table are sharded. Otherwise,
    and where the mesh does not divide the shapes, XLA decides.
    """
    if mesh is None or not _xla_gathers(mesh) or not _divides(mesh, embedding_VD, tokens_BL):
        return jnp.take(embedding_VD, tokens_BL, axis=0).astype(dtype)
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

    def body(part_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        if fsdp > 1:  # this device has some columns: it looks them up for the whole copy
            tokens_BL = jax.lax.all_gather(tokens_BL, "fsdp", tiled=True)
        rows_BLD = _part(part_VD, tokens_BL) if tensor > 1 else jnp.take(part_VD, tokens_BL, axis=0)
        rows_BLD = jax.lax.psum(rows_BLD.astype(dtype), "tensor")
        return jax.lax.all_to_all(rows_BLD, "fsdp", 0, 2, tiled=True) if fsdp > 1 else rows_BLD

    rows = spec(("batch", "length"))
    own = jax.shard_map(
        body, mesh=mesh, in_specs=(spec(("vocab", "embed")), rows), out_specs=PartitionSpec(*rows, None)
    )
    return own(embedding_VD, tokens_BL)


def _part(part_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
    """Rows of the tokens that are in this device's part of the vocabulary, 0 for the others."""
    places_BL = tokens_BL - jax.lax.axis_index("tensor") * part_VD.shape[0]
    own_BL1 = ((places_BL >= 0) & (places_BL < part_VD.shape[0]))[..., None]
    return jnp.where(own_BL1, jnp.take(part_VD, places_BL, axis=0, mode="clip"), 0)


def _xla_gathers(mesh: Mesh) -> bool:
    return mesh.shape["data"] > 1 or (mesh.shape["fsdp"] > 1 and mesh.shape["tensor"] > 1)


def _divides(mesh: Mesh, embedding_VD: jax.Array, tokens_BL: jax.Array) -> bool:
    names = (*zip(embedding_VD.shape, ("vocab", "embed")), *zip(tokens_BL.shape, ("batch", "length")))
    return all(size % axis_size(mesh, name) == 0 for size, name in names)
