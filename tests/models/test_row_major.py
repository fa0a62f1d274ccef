"""The reading of kernels that GPUs ask for, on CPU devices taken for GPUs: the same numbers, whatever the mesh."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from test_lora import LORA, MIXED, QUICK, make_batch, trained

from itune.feed import to_device
from itune.models import row_major
from itune.objectives import make_sft
from itune.plan.count import bodies
from itune.sharding import make_mesh


def first_scan_gives(jaxpr):
    """Shapes that the first scan of a program stacks up, or carries out."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan":
            return {variable.aval.shape for variable in equation.outvars}
        for inner in bodies(equation):
            if found := first_scan_gives(inner):
                return found
    return set()


@pytest.mark.parametrize("shape, fields, remat, lora", [
    ({"fsdp": 4}, {"qk_norm": True, "qkv_bias": True}, "none", True),
    ({"data": 2, "fsdp": 2, "tensor": 2}, {"fused_qkv": True, "fused_gate_up": True}, "none", False),
    ({"expert": 2, "fsdp": 2}, MIXED, "full", False),
], ids=["fsdp", "three axes, fused", "experts"])  # fmt: skip
def test_no_number_changes(make_model, random_params, monkeypatch, shape, fields, remat, lora):
    size = int(np.prod(list(shape.values())))
    mesh = make_mesh(shape, jax.devices()[:size])
    model = make_model(mesh=mesh, remat=remat, **fields)
    params = jax.device_put(random_params(model), model.shardings())
    batch = to_device(make_batch(), mesh)
    trains, frozen = (trained(model, LORA), params) if lora else (params, {})
    objective = make_sft(model, chunk=16, parameters=LORA.parameters) if lora else make_sft(model, chunk=16)

    def loss(trains, frozen, batch):
        return objective(trains, frozen, batch, None)[0]

    texts, found = [], []
    for there in ("cpu", "gpu"):
        monkeypatch.setattr(row_major, "platform", lambda mesh, there=there: there)
        jax.clear_caches()
        step = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK).trace(trains, frozen, batch)
        texts.append(str(step.jaxpr))
        assert first_scan_gives(step.jaxpr)
        found.append(step.lower().compile()(trains, frozen, batch))
    barriers = [text.count("optimization_barrier") for text in texts]
    assert barriers[1] > barriers[0], "no kernel was read that way: the test looks at nothing"
    stacks = {leaf.shape for leaf in jax.tree.leaves(params["blocks"]) if leaf.ndim == 3}
    assert not stacks & first_scan_gives(step.jaxpr), "kernels wait for the backward pass that the scan was given"
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6 * max(1.0, float(np.abs(a).max())))


def test_parameters_are_the_same_and_where_they_were(make_model, monkeypatch):
    model = make_model(mesh=make_mesh({"fsdp": 4}, jax.devices()[:4]))
    before = model.init(jax.random.key(0))
    monkeypatch.setattr(row_major, "platform", lambda mesh: "gpu")
    jax.clear_caches()
    after = dataclasses.replace(model).init(jax.random.key(0))
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == jax.tree.map(lambda leaf: leaf.sharding, before)
    jax.tree.map(np.testing.assert_array_equal, before, after)
