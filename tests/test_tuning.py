"""Freezing and learning rates by regular expression: what is frozen costs nothing, what is named learns at its rate."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from itune.config import OptimizerSection
from itune.feed import to_device
from itune.flops import matrix_parameters
from itune.models.architecture import LayerKind, ModelConfig
from itune.models.hf.plan import leaf_paths
from itune.models.model import Model
from itune.objectives import make_sft
from itune.optim import make_optimizer, make_schedule, rate_multipliers
from itune.sharding import make_mesh
from itune.step import abstract_state, init_state, make_train_step
from itune.tuning import Tuning, frozen_digest
from itune.types import Batch, InputError

V, B, L = 32, 4, 8
CONFIG = ModelConfig(
    vocab_size=V, width=16, num_layers=3, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=24,
    kinds=(LayerKind(), LayerKind(), LayerKind(window=4)), max_length=L, init_std=0.2,
)  # fmt: skip
SECTION = OptimizerSection(learning_rate=1e-2, schedule="constant", weight_decay=0.1)


@pytest.fixture(scope="module")
def model():
    return Model(CONFIG, "llama", mesh=make_mesh({}, jax.devices()[:1]))


@pytest.fixture(scope="module")
def params(model):
    return jax.tree.map(np.asarray, model.init(jax.random.key(0)))


def make_batch():
    ids = np.random.default_rng(0).integers(0, V, (B, L + 1)).astype(np.int32)
    ones, positions = np.ones((B, L), np.int32), np.tile(np.arange(L, dtype=np.int32), (B, 1))
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)


def steps(model, tuning, params, section=SECTION, count=2):
    """(state after some steps, gradient norm of the first)."""
    trainable, frozen = tuning.divide(lambda: jax.device_put(params, model.shardings()), seed=0)
    optimizer = make_optimizer(section, 10, tuning.abstract()[0])
    state = init_state(model, trainable, optimizer, 0, model.mesh, frozen=frozen or None)
    abstract = abstract_state(model, optimizer, model.mesh, trainable=tuning.abstract()[0], frozen=tuning.abstract()[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    step = make_train_step(
        make_sft(model, chunk=16, parameters=tuning.parameters), optimizer, make_schedule(section, 10), model.mesh
    )
    norms = []
    for _ in range(count):
        state, metrics = step(state, to_device(make_batch(), model.mesh))
        norms.append(float(metrics["grad_norm"]))
    return state, norms[0]


def test_frozen_parameters_have_no_state_and_no_gradient_and_stay(model, params):
    tuning = Tuning(model, freeze="embed|rest_0/|/mlp/up_proj")
    state, norm = steps(model, tuning, params)
    whole = leaf_paths(tuning.merged(state.trainable, state.frozen))
    before, trains = leaf_paths(params), leaf_paths(state.trainable)
    assert whole.keys() == before.keys() and len(trains) < len(before)
    for path, leaf in whole.items():
        frozen = path.startswith(("embed", "rest_0")) or "up_proj" in path
        assert (path in trains) != frozen
        assert np.array_equal(leaf, before[path]) == frozen, path
    assert leaf_paths(state.opt_state.mu).keys() == trains.keys()
    pairs = {None: 30, 4: 20}
    trained = sum(leaf.size for path, leaf in trains.items() if path.endswith("kernel"))
    whole_flops, ours = (t.train_flops()(CONFIG, 9, pairs) for t in (Tuning(model), tuning))
    assert whole_flops - ours == 2 * 9 * (matrix_parameters(CONFIG) - trained) > 0

    objective = make_sft(model, chunk=16)
    gradients = leaf_paths(jax.jit(jax.grad(lambda p: objective(p, {}, make_batch(), None)[0]))(params))
    of_trained = np.sqrt(sum(float((gradients[path] ** 2).sum()) for path in trains)) / (B * L)
    np.testing.assert_allclose(norm, of_trained, rtol=1e-5)


def test_rates_multiply_update_and_decay_as_parameter_groups_of_torch_do(model, params):
    rates = {"q_proj": 0.0, r"layer_0/.*_proj/kernel": 3.0, "embed": 0.25}
    section = dataclasses.replace(SECTION, rates=rates)
    state, _ = steps(model, Tuning(model), params, section, count=1)
    objective = make_sft(model, chunk=16)
    gradients = jax.jit(jax.grad(lambda p: objective(p, {}, make_batch(), None)[0] / (B * L)))(params)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradients)))
    found, seen = leaf_paths(state.trainable), set()
    for path, gradient in leaf_paths(gradients).items():
        inner = 3.0 if "layer_0" in path and "_proj" in path else 0.25 if "embed" in path else 1
        rate = 0.0 if "q_proj" in path else inner
        seen.add(rate)
        parameter = torch.nn.Parameter(torch.tensor(np.array(leaf_paths(params)[path])))
        parameter.grad = torch.tensor(np.asarray(gradient)) * min(1.0, 1.0 / (norm + 1e-6))
        decay = 0.0 if "norm" in path else 0.1
        torch.optim.AdamW([parameter], lr=1e-2 * rate, weight_decay=decay).step()
        np.testing.assert_allclose(found[path], parameter.detach().numpy(), atol=2e-6, err_msg=path)
    assert seen == {0.0, 3.0, 0.25, 1}


def test_the_digest_of_frozen_parameters_sees_one_bit_and_no_mesh(model, params):
    digest = frozen_digest(params)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    spread = jax.device_put(params, dataclasses.replace(model, mesh=mesh).shardings())
    assert frozen_digest(spread) == digest != 0 == frozen_digest({})
    kernel = np.array(params["lm_head"]["kernel"])
    kernel[[0, 1]] = kernel[[1, 0]]
    assert frozen_digest({**params, "lm_head": {"kernel": kernel}}) != digest
    kernel[[0, 1]] = kernel[[1, 0]]
    kernel.view(np.uint32)[3, 2] ^= 1
    assert frozen_digest({**params, "lm_head": {"kernel": kernel}}) != digest
    narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    assert frozen_digest(narrow) not in (0, digest)


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("embd", r"train.freeze: 'embd' matches no parameter; the nearest path is embed/embedding"),
        ("(", "is no regular expression"),
        (".", "matches every parameter; nothing would train"),
    ],
)
def test_patterns_that_freeze_nothing_or_all_are_refused(model, freeze, message):
    with pytest.raises(InputError, match=message):
        Tuning(model, freeze=freeze).abstract()


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"embod": 0.1, "lm_head": 1}, r"'embod' decides about .*; the nearest path is embed/embedding"),
        ({"embed": 0.1, "embed/embedding": 1}, r"'embed/embedding' decides about no parameter that trains"),
        ({"embed": -1}, r"optimizer.rates\['embed'\] must be a number of at least 0, found -1"),
        ({"embed": "fast"}, r"must be a number of at least 0, found 'fast'"),
        ({"(": 1.0}, "is no regular expression"),
    ],
)
def test_rates_that_mean_nothing_are_refused(model, rates, message):
    with pytest.raises(InputError, match=message):
        rate_multipliers(model.abstract_params(), rates)
    with pytest.raises(InputError, match=message):
        make_optimizer(dataclasses.replace(SECTION, rates=rates), 3, model.abstract_params())
