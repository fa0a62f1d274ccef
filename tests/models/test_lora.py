"""LoRA in the model: apply equals merge, on every kind of projection and mesh; no gradient of what is frozen."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.feed import to_device
from itune.models import LayerKind, forward
from itune.models.architecture import Experts
from itune.models.lora import Lora, abstract_adapters, adapter_axes, init_adapters, merge
from itune.models.unrolled import unroll, unroll_params
from itune.objectives import make_sft
from itune.plan.count import bodies
from itune.sharding import make_mesh, named
from itune.types import Batch, InputError

# a scanned block of experts, and a dense layer after it
MIXED = {"kinds": (LayerKind(experts=Experts(4, 2, 12)),) * 2 + (LayerKind(),), "num_layers": 3}
LORA = Lora(3, 6.0)
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes most of the time here


def trained(model, lora, seed=1):
    """Adapters whose `b` is no longer zero."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), abstract_adapters(model, lora))


def tokens(rows=4, length=9):
    return np.random.default_rng(0).integers(0, 48, (rows, length)).astype(np.int32)


def make_batch(rows=4, length=8):
    ids = tokens(rows, length + 1)
    ones = np.ones((rows, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)


@pytest.mark.parametrize("fields", [MIXED, {"fused_qkv": True, "fused_gate_up": True}], ids=["experts", "fused"])
def test_adapters_beside_the_base_equal_the_merged_model(make_model, random_params, fields):
    model = make_model(**fields)
    params = random_params(model)
    fresh = init_adapters(model, LORA, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype), abstract_adapters(model, LORA)
    )
    base = forward(model, params, tokens())
    np.testing.assert_array_equal(forward(model, LORA.parameters(fresh, params), tokens()), base)
    adapters = trained(model, LORA)
    beside = forward(model, LORA.parameters(adapters, params), tokens())
    merged = merge(model, LORA, adapters, params)
    assert float(jnp.abs(beside - base).max()) > 0.1
    np.testing.assert_allclose(beside, forward(model, merged, tokens()), atol=1e-5 * float(jnp.abs(base).max()))
    combined = unroll_params(model, LORA.parameters(adapters, params))
    np.testing.assert_allclose(forward(unroll(model), combined, tokens()), beside, atol=2e-5)


def test_new_adapters_follow_peft_and_do_not_depend_on_mesh_or_targets(make_model):
    model = make_model()
    whole = init_adapters(model, LORA, jax.random.key(0))
    a = np.asarray(whole["blocks"]["layer_0"]["mlp"]["down_proj"]["a"])
    assert 0.9 / math.sqrt(24) < np.abs(a).max() <= 1 / math.sqrt(24) and abs(a.mean()) < 0.02
    some = init_adapters(model, dataclasses.replace(LORA, targets="down_proj|attention/q_proj"), jax.random.key(0))
    assert jax.tree.map(np.shape, some) == {"blocks": {"layer_0": {
        "attention": {"q_proj": {"a": (3, 3, 16), "b": (3, 32, 3)}},
        "mlp": {"down_proj": {"a": (3, 3, 24), "b": (3, 16, 3)}},
    }}}  # fmt: skip
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    spread = init_adapters(make_model(mesh=mesh), LORA, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, spread, whole)
    q_proj = spread["blocks"]["layer_0"]["attention"]["q_proj"]
    assert q_proj["a"].sharding.spec == named(mesh, (None, "rank", "embed")).spec
    assert q_proj["b"].sharding.spec == named(mesh, (None, "heads", "rank")).spec


def test_a_mesh_changes_no_number(make_model, random_params):
    alone, mesh = make_model(remat="full", **MIXED), make_mesh({"expert": 2, "tensor": 2, "fsdp": 2})
    model = dataclasses.replace(alone, mesh=mesh)
    params, adapters, batch = random_params(alone), trained(alone, LORA), make_batch()
    results = []
    for each, mesh_ in ((alone, make_mesh({}, jax.devices()[:1])), (model, mesh)):
        objective = make_sft(each, chunk=16, parameters=LORA.parameters)
        step = jax.jit(jax.value_and_grad(lambda t, f, b, o=objective: o(t, f, b, None)[0]), compiler_options=QUICK)
        placed = params if each.mesh is None else jax.device_put(params, each.shardings())
        results.append(step(adapters, placed, to_device(batch, mesh_)))
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5)
    for a, b in zip(*(jax.tree.leaves(r[1]) for r in results), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def products(jaxpr, times=1):
    """(output elements, FLOPs) of every matrix product of a jaxpr, loops counted."""
    for equation in jaxpr.eqns:
        length = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        if equation.primitive.name in ("dot_general", "ragged_dot_general"):
            out, (left, right) = equation.outvars[0].aval, [v.aval for v in equation.invars[:2]]
            (contracted, _), _ = equation.params["dimension_numbers"]
            yield out.shape, times * 2 * out.size * math.prod(left.shape[i] for i in contracted), right.shape
        for inner in bodies(equation):
            yield from products(inner, times * length)


def test_no_gradient_of_a_frozen_kernel_is_computed(make_model):
    """Full tuning multiplies for the layers' kernels and the head; adapters need neither."""
    model = make_model(width=20, mlp_width=28, vocab_size=44, remat="none")
    batch, params = make_batch(), model.abstract_params()
    kernels = {tuple(sorted(leaf.shape[-2:])) for path, leaf in jax.tree_util.tree_leaves_with_path(params)
               if path[-1].key in ("kernel", "embedding")}  # fmt: skip

    def traced(objective, trainable, frozen):
        loss = lambda t, f: objective(t, f, batch, None)[0]  # noqa: E731
        found = list(products(jax.make_jaxpr(jax.grad(loss))(trainable, frozen).jaxpr))
        gradients = [shape for shape, _, _ in found if tuple(sorted(shape[-2:])) in kernels]
        return gradients, sum(flops for _, flops, _ in found)

    full, full_flops = traced(make_sft(model, chunk=10), params, {})
    lora, lora_flops = traced(
        make_sft(model, chunk=10, parameters=LORA.parameters), abstract_adapters(model, LORA), params
    )
    assert len(full) >= 8 and lora == []
    assert lora_flops < 0.95 * full_flops


@pytest.mark.parametrize("policy, wide", [("dots", 2), ("none", 3)])
def test_a_layer_keeps_a_projection_and_its_adapter_as_one_sum(make_model, policy, wide):
    """Of the MLP's width wait for the backward pass: gate and up, and where nothing is recomputed their product."""
    model = make_model(remat=policy)
    ids_BL, params = jax.ShapeDtypeStruct((4, 8), np.int32), model.abstract_params()
    adapters = abstract_adapters(model, LORA)

    def loss(adapters, params, ids_BL):
        return jnp.sum(model.hidden({**params, "lora": adapters}, ids_BL, jnp.ones_like(ids_BL)) ** 2)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(adapters, params, ids_BL).jaxpr
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    kept = [v.aval.shape for v in scans[0].outvars]
    assert kept.count((3, 4, 8, model.config.mlp_width)) == wide, kept


def test_dropout_reaches_adapters_only_in_training(make_model, random_params):
    lora = Lora(3, 6.0, targets="attention/.*|mlp/.*_proj", dropout=0.5)
    model = make_model(remat="full", dropout=lora.dropout, num_layers=2)
    params = random_params(model)
    combined = lora.parameters(trained(model, lora), params)
    still = model.hidden(combined, tokens())
    run = jax.jit(lambda rng: model.hidden(combined, tokens(), rng=rng), compiler_options=QUICK)
    draws = [np.asarray(run(jax.random.key(i))) for i in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).max() > 1e-3 and np.abs(draws[0] - still).max() > 1e-3
    np.testing.assert_array_equal(model.hidden(params, tokens(), rng=jax.random.key(0)), model.hidden(params, tokens()))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        (Lora(2, targets="lm_head"), r"matches no projection; there are attention/k_proj, .*mlp/experts/down_proj"),
        (Lora(2, targets="["), "no regular expression"),
        (Lora(16), r"lora.rank=16 is not lower than the sides of .*; expected at most 15"),
        (Lora(2, dropout=0.1), "lora.dropout=0.1 with adapters on experts is not supported"),
    ],
)
def test_settings_that_fit_no_model_are_refused(make_model, lora, message):
    with pytest.raises(InputError, match=message):
        adapter_axes(make_model(**MIXED), lora)
