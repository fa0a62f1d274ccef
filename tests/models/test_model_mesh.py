"""The same logits and gradients on any mesh of eight devices, parameters born sharded, remat that changes no number."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

import itune.models
from itune.models import LayerKind
from itune.sharding import batch_sharding, make_mesh
from itune.types import InputError

MESHES = [{"data": 8}, {"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 2, "context": 2, "fsdp": 2}]
FIELDS = {"num_heads": 4, "num_kv_heads": 4, "num_layers": 4, "kinds": (LayerKind(5), LayerKind()) * 2}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    tokens_BL = rng.integers(0, 48, (8, 24)).astype(np.int32)
    segments_BL = np.where(np.arange(24) < 10, 1, 2) * (np.arange(24) < 21) * np.ones((8, 1), int)
    return tokens_BL, segments_BL.astype(np.int32)


@pytest.fixture(scope="module")
def alone(make_model, random_params, batch):
    model = make_model(**FIELDS)
    params = random_params(model)
    return params, np.asarray(itune.models.forward(model, params, *batch))


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_logits_on_a_mesh_equal_one_device(make_model, batch, alone, shape):
    mesh = make_mesh(shape)
    model = make_model(mesh=mesh, **FIELDS)
    params = jax.device_put(alone[0], model.shardings())
    tokens_BL, segments_BL = (jax.device_put(x, batch_sharding(mesh)) for x in batch)
    logits = itune.models.forward(model, params, tokens_BL, segments_BL)
    real_BL = batch[1] != 0  # what padding attends to is left open
    np.testing.assert_allclose(np.asarray(logits)[real_BL], alone[1][real_BL], atol=2e-5)


def test_parameters_are_born_sharded_and_one_row_will_do(make_model):
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    model, plain = make_model(mesh=mesh, num_kv_heads=4), make_model(num_kv_heads=4)
    params, same = model.init(jax.random.key(0)), plain.init(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, params, same)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == model.shardings()
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(params)} == {8}
    row_BL = np.arange(9)[None]  # a batch that the mesh does not divide
    ours, theirs = itune.models.forward(model, params, row_BL), itune.models.forward(plain, same, row_BL)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_dimension_that_the_mesh_does_not_divide_is_named(make_model, base_folder):
    model = make_model(mesh=make_mesh({"fsdp": 1, "tensor": 8}), vocab_size=54, mlp_width=20)
    with pytest.raises(InputError) as error:
        model.init(jax.random.key(0))
    message = str(error.value)
    assert "embed/embedding: dimension 0 (vocab, 54) is not a multiple of mesh.tensor=8" in message
    assert "the nearest that divides it is 6" in message
    assert "mlp/down_proj/kernel: dimension 2 (mlp, 20) is not a multiple of mesh.tensor=8" in message
    assert "the nearest that divides it is 5" in message
    with pytest.raises(InputError, match=r"mesh.tensor=8; the nearest that divides it is 7"):
        itune.models.load_pretrained(base_folder, make_mesh({"fsdp": 1, "tensor": 8}), vocab_size=49)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_remat_changes_no_gradient(make_model, random_params, batch, dtype):
    params = random_params(make_model(num_layers=2))
    gradients, jaxprs = {}, {}
    for policy in ("none", "full", "dots"):
        model = dataclasses.replace(make_model(num_layers=2, remat=policy), compute_dtype=dtype)
        traced = jax.jit(jax.grad(lambda params: (model.hidden(params, *batch) ** 2).mean())).trace(params)  # noqa: B023
        gradients[policy], jaxprs[policy] = traced.lower().compile()(params), str(traced.jaxpr)
    for policy in ("full", "dots"):
        pairs = zip(jax.tree.leaves(gradients["none"]), jax.tree.leaves(gradients[policy]), strict=True)
        bounds = {"rtol": 1e-5, "atol": 1e-6} if dtype == "float32" else {"rtol": 2e-2, "atol": 1e-3}
        assert all(np.allclose(a, b, **bounds) for a, b in pairs)
    # matrix products that the backward pass repeats: all of a layer's, or only those of attention
    products = {policy: jaxpr.count("dot_general") for policy, jaxpr in jaxprs.items()}
    assert products["none"] < products["dots"] < products["full"]


def test_bfloat16_compute_stays_near_float32(make_model, batch, alone):
    model = dataclasses.replace(make_model(**FIELDS), compute_dtype="bfloat16")
    hidden = jax.jit(model.hidden)(alone[0], *batch)
    assert hidden.dtype == "bfloat16"
    logits = model.logits(alone[0], hidden)
    assert logits.dtype == np.float32
    real = batch[1] != 0
    difference = np.abs(np.asarray(logits) - alone[1])[real]
    assert difference.mean() < 0.03 * np.abs(alone[1][real]).mean()
