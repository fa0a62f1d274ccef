"""Schedules against transformers, AdamW and clipping against torch, and every way to name an optimizer wrongly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import transformers

from itune import optim
from itune.config import OptimizerSection
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


def test_every_listed_optimizer_takes_a_step():
    params = {"kernel": jnp.full((2, 2), 2.0)}
    names = optim.optimizer_names()
    assert {"adamw", "adafactor", "sgd", "lion", "adam"} <= set(names)
    for name in names:
        optim.make_optimizer(OptimizerSection(name=name), 5, params)  # the tree makes it trace an update


def test_more_steps_than_rates_fit_into_memory_are_refused():
    with pytest.raises(InputError, match=r"train\.max_steps make 1,000,000,000 steps; .* at most 10,000,000,"):
        optim.make_schedule(OptimizerSection(), 10**9)
