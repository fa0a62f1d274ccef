"""Schedules against transformers, AdamW and clipping against torch, and every way to name an optimizer wrongly."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from itune import optim
from itune.config import OptimizerSection
from itune.optax_optimizer import optimizer_names
from itune.sharding import make_mesh
from itune.step import optimizer_shardings
from itune.types import InputError

T = 23


@pytest.mark.parametrize("warmup", [0.0, 5.0, 0.1])  # none, steps, a share: ceil(2.3) = 3
@pytest.mark.parametrize(
    "ours, theirs, settings",
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("constant", "constant_with_warmup", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "linear"}),
    ],
)
def test_schedule_equals_transformers(ours, theirs, settings, warmup):
    steps = {0.0: 0, 5.0: 5, 0.1: 3}[warmup]
    torch_optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    scheduler = transformers.get_scheduler(theirs, torch_optimizer, steps, T, settings or None)
    wanted = []
    for _ in range(T):
        wanted.append(np.float32(scheduler.get_last_lr()[0]))
        torch_optimizer.step()
        scheduler.step()
    section = OptimizerSection(learning_rate=3e-4, schedule=ours, warmup=warmup)
    schedule = optim.make_schedule(section, T)
    assert np.asarray(jax.vmap(schedule)(jnp.arange(T))).tolist() == wanted
    assert schedule(T + 10) == schedule(T)


def test_unknown_schedule():
    with pytest.raises(InputError, match=r"optimizer\.schedule.*'step'"):
        optim.make_schedule(OptimizerSection(schedule="step"), T)


def named_parameters():
    rng = np.random.default_rng(0)
    shapes = {
        "embed": {"embedding": (7, 4)},
        "blocks": {"q_proj": {"kernel": (2, 4, 4), "bias": (2, 4)}, "q_norm": {"scale": (2, 4)}},
        "final_norm": {"scale": (4,)},
    }
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), jnp.float32), shapes, is_leaf=lambda x: isinstance(x, tuple)
    )


def test_norms_and_biases_do_not_decay():
    mask = optim.decay_mask(named_parameters())
    assert mask == {
        "embed": {"embedding": True},
        "blocks": {"q_proj": {"kernel": True, "bias": False}, "q_norm": {"scale": False}},
        "final_norm": {"scale": False},
    }


def test_adamw_and_clipping_equal_torch_over_ten_steps():
    params = named_parameters()
    section = OptimizerSection(learning_rate=0.1, schedule="cosine", warmup=3, weight_decay=0.3, b2=0.99)
    optimizer = optim.make_optimizer(section, 10, jax.eval_shape(lambda: params))
    rates = optim.learning_rates(section, 10)
    leaves = [torch.tensor(np.asarray(p), requires_grad=True) for p in jax.tree.leaves(params)]
    decays = jax.tree.leaves(optim.decay_mask(params))
    groups = [{"params": [p], "weight_decay": 0.3 if decayed else 0.0} for p, decayed in zip(leaves, decays)]
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.99), eps=1e-8)

    @jax.jit
    def update(params, state, gradients):
        gradients, norm = optim.clip_by_global_norm(gradients, 2.0)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, norm

    state, rng = optimizer.init(params), np.random.default_rng(1)
    for step in range(10):
        size = 10.0 ** -(step % 3)
        gradients = jax.tree.map(lambda p, size=size: (size * rng.normal(size=p.shape)).astype(np.float32), params)
        params, state, norm = update(params, state, gradients)
        for leaf, gradient in zip(leaves, jax.tree.leaves(gradients)):
            leaf.grad = torch.tensor(gradient)
        np.testing.assert_allclose(norm, torch.nn.utils.clip_grad_norm_(leaves, 2.0), rtol=1e-6)
        for group in theirs.param_groups:
            group["lr"] = rates[step]
        theirs.step()
        for ours, leaf in zip(jax.tree.leaves(params), leaves):
            np.testing.assert_allclose(ours, leaf.detach().numpy(), rtol=2e-6, atol=5e-7)


def test_clip_leaves_small_gradients_and_zero_means_off():
    gradients = {"a": jnp.array([3.0, 4.0])}
    for max_norm, factor in [(10.0, 1.0), (2.5, 0.5), (0.0, 1.0)]:
        clipped, norm = optim.clip_by_global_norm(gradients, max_norm, eps=0.0)
        assert norm == 5.0
        np.testing.assert_allclose(clipped["a"], factor * gradients["a"], rtol=1e-6)


def test_moment_dtypes():
    section = OptimizerSection(moment_dtype="bfloat16")
    params = named_parameters()
    state = optim.make_optimizer(section, 5).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.mu)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.nu)} == {jnp.dtype("float32")}
    both = dataclasses.replace(section, options={"nu_dtype": "bfloat16"})
    state = optim.make_optimizer(both, 5).init(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.nu)} == {jnp.dtype("bfloat16")}


def test_sgd_decays_as_torch_does():
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([1.0])}
    settings = {"learning_rate": 0.5, "schedule": "constant", "weight_decay": 0.1, "options": {"momentum": 0.9}}
    section = OptimizerSection(name="sgd", **settings)
    optimizer = optim.make_optimizer(section, 5)
    state = optimizer.init(params)
    leaf = torch.tensor([1.0, -2.0], requires_grad=True)
    theirs = torch.optim.SGD([leaf], lr=0.5, weight_decay=0.1, momentum=0.9)
    for _ in range(3):
        updates, state = optimizer.update({"kernel": jnp.ones(2), "bias": jnp.zeros(1)}, state, params)
        params = optax.apply_updates(params, updates)
        leaf.grad = torch.ones(2)
        theirs.step()
    np.testing.assert_allclose(params["kernel"], leaf.detach().numpy(), rtol=1e-6)
    assert params["bias"] == 1.0


@pytest.mark.parametrize("name", ["adafactor", "lion", "adamw", "sgd", "rmsprop", "lamb"])
def test_optimizers_by_name_descend(name):
    params = {"kernel": jnp.full((4, 3), 2.0)}
    optimizer = optim.make_optimizer(OptimizerSection(name=name, learning_rate=0.1, schedule="constant"), 5, params)

    @jax.jit
    def update(params, state):
        updates, state = optimizer.update(params, state, params)  # the gradient of |p|^2 / 2
        return optax.apply_updates(params, updates), state

    params, _ = update(params, optimizer.init(params))
    assert 0 < float(jnp.abs(params["kernel"]).max()) < 2.0


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"name": "adamv"}, "'adamv'.*nearest: adam"),
        ({"name": "adafactr"}, "nearest: adafactor"),
        ({"name": "clip"}, "is no optimizer"),
        ({"name": "lbfgs"}, "is no optimizer"),
        ({"name": "sgd", "options": {"momentun": 0.9}}, "'momentun'; nearest: momentum"),
        ({"options": {"nesterovv": True}}, "'adamw' has no setting 'nesterovv'"),
        ({"name": "sgd", "b2": 0.95}, "'sgd' has no setting 'b2'"),
        ({"name": "sm3"}, "is no optimizer"),  # optax gives it no schedule
        ({"name": "adagrad", "weight_decay": 0.1}, "'adagrad' has no setting 'weight_decay'"),
        ({"name": "adagrad", "moment_dtype": "bfloat16"}, "'adagrad' has no setting 'moment_dtype'"),
        ({"name": "sgd", "options": {"momentum": "much"}}, "'sgd' does not accept.*much"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(InputError, match=message):
        optim.make_optimizer(OptimizerSection(**settings), 5, {"kernel": jnp.ones((2, 2))})


def test_more_steps_than_rates_fit_into_memory_are_refused():
    with pytest.raises(InputError, match=r"train\.max_steps make 1,000,000,000 steps; .* at most 10,000,000,"):
        optim.make_schedule(OptimizerSection(), 10**9)


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", optimizer_names())
def test_every_listed_optimizer_keeps_a_float32_state(name, param_dtype):
    """Gradients are float32. A state that leaves a step in another dtype ended the run after its first step."""
    params = jax.tree.map(lambda p: p.astype(param_dtype), named_parameters())
    gradients = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    options = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = optim.make_optimizer(OptimizerSection(name=name, options=options), 5, params)
    before = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, gradients, before, params)
    assert after == before
    floats = [leaf for leaf in jax.tree.leaves((updates, after)) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}


def test_a_state_that_would_change_its_dtype_is_refused(monkeypatch):
    def forgetful(learning_rate: Callable = 0.1):  # the state of momentum in the dtype of the weights
        return optax.GradientTransformation(
            lambda params: jax.tree.map(lambda p: jnp.zeros_like(p, jnp.bfloat16), params),
            lambda gradients, state, params: (gradients, gradients),
        )

    monkeypatch.setattr(optax, "forgetful", forgetful, raising=False)
    with pytest.raises(InputError, match=r"'forgetful' cannot run .* bfloat16 before a step and float32 after"):
        optim.make_optimizer(OptimizerSection(name="forgetful"), 5, named_parameters())


def test_second_moments_shrink_beside_bfloat16_weights_and_first_moments():
    """In bfloat16, to nearest, 0.999 v is v again."""
    params = {"kernel": jnp.ones((2, 2), jnp.bfloat16)}
    section = OptimizerSection(name="adam", moment_dtype="bfloat16", schedule="constant")
    optimizer = optim.make_optimizer(section, 5, params)
    update = jax.jit(lambda size, state: optimizer.update({"kernel": jnp.full((2, 2), size)}, state, params)[1])
    state = update(1.0, optimizer.init(params))
    assert {leaf.dtype for leaf in jax.tree.leaves(state[0].mu)} == {jnp.dtype("bfloat16")}
    for _ in range(300):
        state = update(0.0, state)
    np.testing.assert_allclose(state[0].nu["kernel"], 1e-3 * 0.999**300, rtol=1e-3)


@pytest.mark.parametrize("name", optimizer_names())
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_weight_decay_is_what_was_asked_for_and_spares_norms_and_biases(name, rate):
    section = OptimizerSection(name=name, learning_rate=1e-3, schedule="constant", weight_decay=rate)
    params, other = jax.tree.map(jnp.ones_like, named_parameters()), jax.tree.map(jnp.zeros_like, named_parameters())
    try:
        optimizer = optim.make_optimizer(section, 5, params)
    except InputError as error:
        assert rate and "has no setting 'weight_decay'" in str(error)
        return
    if name in ("noisy_sgd", "fromage", "yogi"):  # noise, a length that is held, a moment that begins above 0
        return
    updates, _ = optimizer.update(other, optimizer.init(params), params)
    shrinks = jax.tree.map(lambda u: bool((u < 0).all()) if rate else bool((u != 0).any()), updates)
    assert shrinks == (optim.decay_mask(params) if rate else jax.tree.map(lambda _: False, params))
    if rate and name not in ("adadelta", "lamb", "lars"):  # which scale the decay as they scale the gradient
        np.testing.assert_allclose(updates["blocks"]["q_proj"]["kernel"], -1e-3 * rate, rtol=1e-5)


@pytest.mark.parametrize("theirs", [torch.optim.Adafactor, transformers.Adafactor])
def test_adafactor_decays_as_torch_and_transformers_do(theirs):
    leaf = torch.nn.Parameter(torch.ones(2, 2))
    more = {"relative_step": False, "scale_parameter": False} if theirs is transformers.Adafactor else {}
    reference = theirs([leaf], lr=1e-2, weight_decay=0.1, **more)
    section = OptimizerSection(name="adafactor", learning_rate=1e-2, schedule="constant", weight_decay=0.1)
    params = {"kernel": jnp.ones((2, 2))}
    optimizer = optim.make_optimizer(section, 5, params)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update({"kernel": jnp.zeros((2, 2))}, state, params)
        params = optax.apply_updates(params, updates)
        leaf.grad = torch.zeros(2, 2)
        reference.step()
    np.testing.assert_allclose(params["kernel"], leaf.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(optimizer_names()) - {"noisy_sgd"}))  # which draws by the leaf
def test_stacked_layers_are_updated_as_each_by_itself(name):
    """Norms of whole tensors must not mix layers: an optimizer that reads them belongs into BY_TENSOR."""
    rng = np.random.default_rng(0)
    kernels, gradients = (
        [jnp.asarray(rng.normal(size=(130, 129)) * size, jnp.float32) for size in sizes] for sizes in ((1, 10), (1, 1))
    )  # large enough that adafactor factors them
    decay = 0.0 if name not in ("adamw", "novograd", "lamb", "lars", "adafactor") else 0.1
    section = OptimizerSection(name=name, learning_rate=1e-2, schedule="constant", weight_decay=decay)

    def steps(params, gradients):
        optimizer = optim.make_optimizer(section, 5, params)
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(gradients, state, params)
        return updates

    both = ({"blocks": {"layer_0": jnp.stack(leaves)}, "embed": leaves[0]} for leaves in (kernels, gradients))
    stacked = steps(*both)
    alone = [steps({"rest_0": kernel}, {"rest_0": gradient})["rest_0"] for kernel, gradient in zip(kernels, gradients)]
    for ours, by_itself in zip([*stacked["blocks"]["layer_0"], stacked["embed"]], [*alone, alone[0]]):
        np.testing.assert_allclose(ours, by_itself, rtol=2e-5, atol=1e-7)


def test_the_state_of_stacked_layers_lies_as_they_do():
    mesh = make_mesh({"fsdp": 8})
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    leaf = jax.ShapeDtypeStruct((2, 8, 8), jnp.float32, sharding=sharding)
    params = {"blocks": {"layer_0": {"kernel": leaf}}}
    optimizer = optim.make_optimizer(OptimizerSection(name="lamb", weight_decay=0.1), 5, params)
    places = jax.tree.leaves(optimizer_shardings(optimizer, params, mesh))
    leaves = jax.tree.leaves(jax.eval_shape(optimizer.init, params))
    moments = [place for place, leaf in zip(places, leaves, strict=True) if leaf.shape == (2, 8, 8)]
    assert moments == [sharding, sharding]


def test_listed_optimizers():
    assert {"adamw", "adafactor", "sgd", "lion", "adam"} <= set(optimizer_names())
