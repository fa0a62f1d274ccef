"""Rows of the embedding on meshes: values and gradients as on one device, without gathering hidden states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.models.lookup import lookup
from itune.sharding import make_mesh, named

B, L, V, D = 8, 6, 16, 8


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [
    {"data": 8}, {"data": 4, "fsdp": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "expert": 2}, {"data": 2, "tensor": 4}, {"fsdp": 4, "tensor": 2},
], ids=str)  # fmt: skip
def test_as_on_one_device_without_gathering_rows(shape, dtype):
    rng = np.random.default_rng(0)
    table_VD = rng.normal(size=(V, D)).astype(np.float32)
    tokens_BL = rng.integers(0, V, (B, L)).astype(np.int32)
    weights_BLD = jnp.asarray(rng.normal(size=(B, L, D)), dtype)

    def loss(table_VD, mesh=None):
        rows_BLD = lookup(table_VD, tokens_BL, dtype, mesh)
        return jnp.sum((rows_BLD * weights_BLD).astype(jnp.float32)), rows_BLD

    (_, rows), wanted = jax.value_and_grad(loss, has_aux=True)(table_VD)
    mesh = make_mesh(shape)
    placed = jax.device_put(table_VD, named(mesh, ("vocab", "embed")))
    step = jax.jit(jax.value_and_grad(lambda t: loss(t, mesh), has_aux=True)).lower(placed).compile()
    (_, found_rows), found = step(placed)
    np.testing.assert_array_equal(found_rows, rows)
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)
    gathered = [line for line in step.as_text().splitlines() if " all-gather(" in line]
    assert all("s32[" in line for line in gathered), gathered


def test_what_the_mesh_does_not_divide_is_left_to_xla():
    table_VD, tokens_BL = jnp.arange(12.0).reshape(6, 2), jnp.asarray([[0, 5], [3, 3], [1, 0]])
    found = jax.jit(lambda t: lookup(t, tokens_BL, "float32", make_mesh({"data": 8})))(table_VD)
    np.testing.assert_array_equal(found, table_VD[tokens_BL])
