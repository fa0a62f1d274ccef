"""Mixture of experts: the definition, nothing dropped, the same numbers on any mesh, float32 routing."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.models import LayerKind, moe
from itune.models.architecture import Experts
from itune.models.groups import sort
from itune.models.lora import Lora, abstract_adapters, adapter_shardings
from itune.models.moe import mix, route
from itune.plan.count import bodies
from itune.plan.hlo import arrays
from itune.sharding import batch_sharding, make_mesh

# of four experts: fsdp divides their kernels' sides, nothing, and the experts themselves
MESHES = [{"expert": 4, "fsdp": 2}, {"expert": 2, "tensor": 2, "data": 2}, {"expert": 2, "tensor": 2, "fsdp": 2}]
BIASED = Experts(4, 2, 12, softmax_chosen=True, biases=True, clamp=(1.7, 0.8))


@pytest.mark.parametrize("batch", [3, 0], ids=["tiles", "ragged"])
@pytest.mark.parametrize("experts", [Experts(5, 2, 6), BIASED], ids=["plain", "biased"])
def test_equals_the_definition_even_when_all_tokens_choose_one_expert(experts, batch):
    rng = np.random.default_rng(0)
    shapes = {"gate_proj": (experts.width, 8), "up_proj": (experts.width, 8), "down_proj": (8, experts.width)}
    stacks = {name: {"kernel": rng.normal(size=(experts.count, *shape))} for name, shape in shapes.items()}
    for name, shape in shapes.items():
        if experts.biases:
            stacks[name]["bias"] = rng.normal(size=(experts.count, shape[0]))

    def project(name, e, x):
        return stacks[name]["kernel"][e] @ x + (stacks[name]["bias"][e] if experts.biases else 0)

    x = rng.normal(size=(2, 7, 8))
    chosen = rng.permuted(np.tile(np.arange(experts.count), (2, 7, 1)), axis=-1)[..., : experts.chosen]
    chosen[0, :, 0], chosen[0, :, 1] = 1, 3  # one row crowds two experts; one of the others is empty there
    weights = rng.random((2, 7, experts.chosen))
    wanted = np.zeros_like(x)
    for place in np.ndindex(2, 7):
        for e, weight in zip(chosen[place], weights[place], strict=True):
            gate, up = project("gate_proj", e, x[place]), project("up_proj", e, x[place])
            if experts.clamp:
                gate, up = np.minimum(gate, 0.8), np.clip(up, -0.8, 0.8)
                middle = gate / (1 + np.exp(-1.7 * gate)) * (up + 1)
            else:
                middle = np.maximum(gate, 0) * up
            wanted[place] += weight * project("down_proj", e, middle)
    arrays = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (x, weights, stacks))
    found = jax.jit(lambda x, w, s: mix(experts, jax.nn.relu, (), x, jnp.asarray(chosen), w, s, None, batch))(*arrays)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("ways", [1, 2, 8])
def test_devices_that_share_the_experts_share_their_rows(ways):
    """A device multiplies at most twice the rows of its own experts, whatever the number of devices."""
    rows, experts = 16384, 128
    count = experts // ways
    expert_S = jnp.minimum(jax.random.randint(jax.random.key(0), (rows,), 0, experts), count)
    for batch in (4, experts):
        row_P, _, groups = sort(expert_S, count, batch, ways)
        expert_UN, turns = groups.tiles
        assert expert_UN.shape[1] <= count
        assert int(turns) * expert_UN.shape[1] * len(row_P) // expert_UN.size <= 2 * int(groups.sizes_E.sum())


@pytest.mark.parametrize("batch", [4, 0], ids=["tiles", "ragged"])
def test_gradients_of_biases_are_sums_in_float32_and_a_bad_token_reaches_its_own_experts_only(batch):
    """4,096 ones add up to 256 in bfloat16. What stands in no place takes part in nothing, infinities neither."""
    experts, tokens = Experts(4, 1, 8, biases=True), 4096
    ones = {name: {"kernel": jnp.ones((4, 8, 8), jnp.bfloat16), "bias": jnp.zeros((4, 8), jnp.bfloat16)}
            for name in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip
    chosen_BLC = jnp.where(jnp.arange(tokens) == 0, 3, jnp.arange(tokens) % 2).reshape(1, tokens, 1)

    def loss(stacks, x_BLD):
        weights_BLC = jnp.ones((1, tokens, 1))
        return mix(experts, jax.nn.relu, (), x_BLD, chosen_BLC, weights_BLC, stacks, None, batch)[:, 1:].sum()

    found = jax.jit(jax.grad(loss))(ones, jnp.full((1, tokens, 8), 0.01, jnp.bfloat16).at[0, 0].set(jnp.inf))
    assert found["down_proj"]["bias"][:3, 0].tolist() == [2048, 2048, 0]  # 2,047 and 2,048, rounded to bfloat16
    assert all(jnp.isfinite(leaf[:3]).all() for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("batch", [4, 16])
def test_no_row_meets_every_expert(batch):
    """Off a TPU XLA writes a ragged product as one in which each does, with zeros: the rows once for each expert."""
    experts, width, tokens = Experts(16, 2, 24), 32, 128
    sides = {"gate_proj": (24, width), "up_proj": (24, width), "down_proj": (width, 24)}
    stacks = {name: {"kernel": jnp.zeros((16, *side))} for name, side in sides.items()}

    def largest(batch):
        def loss(x_BLD, stacks):
            chosen_BLC = jnp.arange(2 * tokens).reshape(1, tokens, 2) % 16
            return mix(experts, jax.nn.silu, (), x_BLD, chosen_BLC, jnp.ones((1, tokens, 2)), stacks, None, batch).sum()

        text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((1, tokens, width)), stacks).compile().as_text()
        return max(math.prod(dims) for dtype, dims in arrays(text) if dtype == "f32")

    rows = 2 * tokens
    assert largest(0) >= 16 * rows * 24, "the test looks in the wrong place"
    assert largest(batch) <= max(2 * rows * width, 16 * width * 24)


def test_weights_of_the_chosen():
    logits = jnp.log(jnp.asarray([[[0.1, 0.4, 0.3, 0.2]]]))
    assert route(Experts(4, 2, 1), logits)[0].tolist() == [[[1, 2]]]
    np.testing.assert_allclose(route(Experts(4, 2, 1), logits)[1], [[[4 / 7, 3 / 7]]], rtol=1e-6)
    np.testing.assert_allclose(route(Experts(4, 2, 1, normalise=False), logits)[1], [[[0.4, 0.3]]], rtol=1e-6)
    np.testing.assert_allclose(route(Experts(4, 2, 1, softmax_chosen=True), logits)[1], [[[4 / 7, 3 / 7]]], rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=300), st.booleans(), st.integers(1, 5))
def test_every_row_has_one_place_in_a_tile_of_its_expert(count, chosen, one, batch):
    """Also where all choose one expert, or an expert that lives elsewhere (`count`)."""
    expert_S = np.minimum([chosen[0]] * 300 if one else chosen, count)
    row_P, expert_P, groups = sort(jnp.asarray(expert_S), count, batch)
    expert_UN, turns = map(np.asarray, groups.tiles)
    row_P, expert_P, rows = np.asarray(row_P), np.asarray(expert_P), len(row_P) // expert_UN.size
    of_tile_P, filled_P = np.repeat(expert_UN, rows), expert_P < count
    assert sorted(row_P[filled_P]) == np.flatnonzero(expert_S < count).tolist()
    assert (expert_P[filled_P] == expert_S[row_P[filled_P]]).all()
    assert (expert_P[filled_P] == of_tile_P[filled_P]).all()
    assert turns <= len(expert_UN) and not filled_P[turns * expert_UN.shape[1] * rows :].any()
    assert groups.sizes_E.tolist() == np.bincount(expert_S, minlength=count)[:count].tolist()


@pytest.mark.parametrize("shape, device", [*((shape, "cpu") for shape in MESHES), (MESHES[0], "tpu")], ids=str)
def test_a_mesh_changes_no_number(make_model, random_params, shape, device, monkeypatch):
    """Nor does the way in which a TPU multiplies."""
    monkeypatch.setattr(moe, "platform", lambda mesh: device if mesh is not None else "cpu")
    fields = {"kinds": (LayerKind(experts=Experts(4, 2, 12)), LayerKind(experts=BIASED)), "num_layers": 2}
    fields |= {"sinks": True, "num_kv_heads": 4}
    mesh = make_mesh(shape)
    model, alone = make_model(mesh=mesh, **fields), make_model(**fields)
    params = random_params(alone)
    tokens_BL = np.random.default_rng(0).integers(0, 48, (4, 9)).astype(np.int32)

    def loss(model, params, tokens_BL):
        return (model.hidden(params, tokens_BL) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss, 1), static_argnums=0)
    placed = jax.device_put(params, model.shardings())
    ours = step(model, placed, jax.device_put(tokens_BL, batch_sharding(mesh)))
    theirs = step(alone, params, tokens_BL)
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(ours[1]), jax.tree.leaves(theirs[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(np.abs(b).max())))


def test_experts_are_sharded(make_model):
    kinds = (LayerKind(experts=Experts(4, 2, 12)),)
    model = make_model(mesh=make_mesh({"expert": 4, "fsdp": 2}), kinds=kinds, num_layers=1)
    axes = model.logical_axes()["blocks"]["layer_0"]["mlp"]["experts"]
    assert axes["up_proj"]["kernel"] == ("layers", "expert", "mlp", "embed")
    assert axes["down_proj"]["kernel"] == ("layers", "expert", "embed", "mlp")


def test_fsdp_divides_the_experts_themselves_where_there_are_enough(make_model):
    """Then a device gathers whole kernels, and an adapter without a side over fsdp is divided as well."""
    kinds = (LayerKind(experts=Experts(8, 2, 12)),)
    model = make_model(mesh=make_mesh({"expert": 2, "fsdp": 4}), kinds=kinds, num_layers=1)
    axes = model.logical_axes()["blocks"]["layer_0"]["mlp"]["experts"]
    assert axes["up_proj"]["kernel"] == ("layers", "experts", "mlp", "whole")
    adapters = abstract_adapters(model, Lora(2))
    for leaf, place in zip(jax.tree.leaves(adapters), jax.tree.leaves(adapter_shardings(model, Lora(2))), strict=True):
        if leaf.ndim == 4:  # layers, experts, and two sides
            assert place.shard_shape(leaf.shape) == (1, 1, *leaf.shape[2:])


def sums_over_devices(jaxpr):
    """(dtype, shape) of all that the devices of a mesh add up, inside shard_maps."""
    for equation in jaxpr.eqns:
        if equation.primitive.name.startswith(("psum", "reduce_scatter")):
            yield from ((v.aval.dtype.name, v.aval.shape) for v in equation.invars)
        for inner in bodies(equation):
            yield from sums_over_devices(inner)


@pytest.mark.parametrize("count", [2, 8])
def test_devices_add_up_gradients_of_experts_in_float32(make_model, count):
    """Contract 3. In bfloat16, in which the products are computed, every addition would round. Whether fsdp divides
    the experts (of 8) or their kernels' sides (of 2)."""
    kinds = (LayerKind(experts=Experts(count, 2, 12, biases=True)),)
    mesh = make_mesh({"data": 2, "fsdp": 4})
    model = make_model(mesh=mesh, kinds=kinds, num_layers=1, remat="full")
    model = dataclasses.replace(model, compute_dtype="bfloat16")

    def loss(params, tokens_BL):
        return (model.hidden(params, tokens_BL).astype(jnp.float32) ** 2).mean()

    traced = jax.jit(jax.grad(loss)).trace(model.abstract_params(), jax.ShapeDtypeStruct((8, 9), jnp.int32))
    found = [(dtype, shape) for dtype, shape in sums_over_devices(traced.jaxpr.jaxpr) if shape[-1:] == (12,) or
             shape[-2:-1] == (12,)]  # fmt: skip
    assert len(found) >= 5, "of three kernels and two biases"
    assert {dtype for dtype, _ in found} == {"float32"}


@pytest.mark.parametrize("device, product", [("cpu", "while["), ("tpu", "ragged_dot")])  # a loop over tiles, or that
def test_dots_keeps_the_products_of_experts_and_changes_no_gradient(
    make_model, random_params, device, product, monkeypatch
):
    """Also inside the shard_map of a mesh."""
    monkeypatch.setattr(moe, "platform", lambda mesh: device if mesh is not None else "cpu")
    fields = {"kinds": (LayerKind(experts=Experts(4, 2, 12)),) * 2, "num_layers": 2}
    mesh, tokens_BL = make_mesh(MESHES[1]), np.arange(64, dtype=np.int32).reshape(8, 8) % 48
    gradients, products = {}, {}
    for policy in ("none", "dots", "full"):
        model = make_model(mesh=mesh, remat=policy, **fields)
        params = jax.device_put(random_params(model), model.shardings())
        tokens = jax.device_put(tokens_BL, batch_sharding(mesh))

        def loss(params, tokens, model=model):
            return (model.hidden(params, tokens, jnp.ones_like(tokens)) ** 2).mean()

        traced = jax.jit(jax.grad(loss)).trace(params, tokens)
        gradients[policy] = traced.lower().compile()(params, tokens)
        products[policy] = str(traced.jaxpr).count(product)
    for policy in ("dots", "full"):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients["none"],
                     gradients[policy])  # fmt: skip
    assert products["none"] == products["dots"] < products["full"]
