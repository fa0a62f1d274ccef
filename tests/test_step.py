"""The step: what it reports, where its state lies, what it refuses, that it repeats itself bit by bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.config import OptimizerSection
from itune.feed import to_device
from itune.models.architecture import LayerKind, ModelConfig
from itune.models.model import Model
from itune.objectives import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.sharding import make_mesh
from itune.step import abstract_state, check_batch, init_state, make_eval_step, make_train_step
from itune.types import Batch, InputError

V, B, L = 32, 8, 8
CONFIG = ModelConfig(
    vocab_size=V, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, mlp_width=32,
    kinds=(LayerKind(),), max_length=L,
)  # fmt: skip
SECTION = OptimizerSection(learning_rate=1e-3, schedule="linear", warmup=2, weight_decay=0.1)


def make_batch(rows=B, seed=0, weight=0.5):
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, L), np.int32)
    segments[:, -2:] = 0
    weights = ((rng.random((rows, L)) < weight) & (segments > 0)).astype(np.float32)
    tokens, targets = rng.integers(0, V, (2, rows, L)).astype(np.int32)
    return Batch(tokens, targets, weights, segments, np.tile(np.arange(L, dtype=np.int32), (rows, 1)))


class Sharded:
    """A model over fsdp=2 x tensor=2, its first state kept on the host, and its step, compiled once for the module."""

    def __init__(self):
        self.mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
        self.model = Model(CONFIG, "llama", mesh=self.mesh)
        self.optimizer = make_optimizer(SECTION, 10)
        schedule = make_schedule(SECTION, 10)
        self.step = make_train_step(make_sft(self.model), self.optimizer, schedule, self.mesh, accumulation=2)
        self.params = on_host(dataclasses.replace(self.model, mesh=None).init(jax.random.key(0)))
        state = init_state(self.model, self.params, self.optimizer, 0, self.mesh)
        self.shardings, self.saved = jax.tree.map(lambda leaf: leaf.sharding, state), on_host(state)

    def state(self):
        return jax.device_put(self.saved, self.shardings)


def on_host(tree):
    """A copy: a view on CPU would hold the buffer and keep it from being donated."""
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


@pytest.fixture(scope="module")
def sharded():
    return Sharded()


def layout(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding.spec), tree)


def test_abstract_state_is_the_shape_and_place_of_the_real_one(sharded):
    state = sharded.state()
    abstract = abstract_state(sharded.model, sharded.optimizer, sharded.mesh)
    assert layout(abstract) == layout(state)
    for moment in (state.opt_state.mu, state.opt_state.nu):
        assert layout(moment) == layout(state.trainable)
    kernel = state.opt_state.mu["blocks"]["layer_0"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size * 4 == kernel.size
    shapes = jax.eval_shape(sharded.step, abstract, make_batch())
    assert shapes[1]["loss"].shape == ()


def test_step_keeps_the_layout_donates_and_reports(sharded):
    old, batch = sharded.state(), make_batch()
    state, metrics = sharded.step(old, to_device(batch, sharded.mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    assert jax.tree.map(lambda leaf: leaf.sharding, state) == sharded.shardings and int(state.step) == 1
    assert set(metrics) == {
        "loss", "grad_norm", "learning_rate", "accuracy", "supervised_tokens", "tokens", "finite"
    }  # fmt: skip
    assert metrics["learning_rate"] == 0  # the first step of a warm-up
    assert int(metrics["supervised_tokens"]) == np.count_nonzero(batch.loss_weights_BL)
    assert int(metrics["tokens"]) == np.count_nonzero(batch.segment_ids_BL)
    assert bool(metrics["finite"]) and 3 < metrics["loss"] < 4 and metrics["grad_norm"] > 0
    assert jax.tree.all(jax.tree.map(np.array_equal, sharded.params, on_host(state.trainable)))
    state, metrics = sharded.step(state, to_device(batch, sharded.mesh))
    assert metrics["learning_rate"] == np.float32(0.5e-3)
    assert not jax.tree.all(jax.tree.map(np.array_equal, sharded.params, on_host(state.trainable)))


def test_two_runs_are_equal_bit_by_bit(sharded):
    ends = []
    for _ in range(2):
        state = sharded.state()
        for seed in range(4):
            state, metrics = sharded.step(state, to_device(make_batch(seed=seed), sharded.mesh))
        ends.append(on_host((state, metrics)))
    assert jax.tree.all(jax.tree.map(np.array_equal, *ends))


def test_no_weight_changes_nothing_and_broken_weights_show(sharded):
    state, _ = sharded.step(sharded.state(), to_device(make_batch(), sharded.mesh))
    before = on_host(state.opt_state.nu)
    state, metrics = sharded.step(state, to_device(make_batch(weight=0.0), sharded.mesh))
    assert metrics["loss"] == 0 and metrics["grad_norm"] == 0 and bool(metrics["finite"])
    after = on_host(state.opt_state.nu)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.float32(0.999) * a, b, rtol=1e-6), before, after)
    kernel = np.full_like(sharded.params["lm_head"]["kernel"], np.nan)
    spoiled = {**sharded.params, "lm_head": {"kernel": kernel}}
    state = sharded.state().replace(trainable=jax.device_put(spoiled, sharded.shardings.trainable))
    assert not bool(sharded.step(state, to_device(make_batch(), sharded.mesh))[1]["finite"])


BAD = ("nan loss", "inf loss", "gradient")


def spoiled_by(what):
    """A batch whose row 3 of eight makes the objective below fail in this way."""
    batch = make_batch()
    batch.tokens_BL[:, 0] = 0
    batch.tokens_BL[3, 0] = V - 1 - BAD.index(what)
    return batch


def failing(objective):
    """By the token that begins row 3: NaN or infinity joins the loss, or infinity one gradient and 0 the loss."""
    def loss(trainable, frozen, batch, rng):
        total, weight, metrics = objective(trainable, frozen, batch, rng)
        sign, some = V - 1 - batch.tokens_BL[3, 0], jax.tree.leaves(trainable)[0].sum()
        inner = jnp.where(sign == 2, some - jax.lax.stop_gradient(some), 1)
        extra = jnp.where(inner == 0, jnp.sqrt(inner), 0)
        return total + jnp.where(sign == 0, jnp.nan, jnp.where(sign == 1, jnp.inf, extra)), weight, metrics

    return dataclasses.replace(objective, loss=loss)


def test_update_that_is_not_finite_on_one_shard_is_skipped_everywhere():
    mesh, model = make_mesh({"fsdp": 8}), Model(CONFIG, "llama")
    model = dataclasses.replace(model, mesh=mesh)
    optimizer = make_optimizer(SECTION, 10)
    step = make_train_step(failing(make_sft(model)), optimizer, make_schedule(SECTION, 10), mesh)
    params = on_host(dataclasses.replace(model, mesh=None).init(jax.random.key(0)))
    state = init_state(model, params, optimizer, 0, mesh)
    state, _ = step(state, to_device(make_batch(seed=1), mesh))
    for what in BAD:
        before = on_host(state)
        state, metrics = step(state, to_device(spoiled_by(what), mesh))
        after = on_host(state)
        assert not bool(metrics["finite"]), what
        assert np.isfinite(metrics["loss"]) == (what == "gradient")
        assert jax.tree.all(jax.tree.map(np.array_equal, before.trainable, after.trainable)), what
        assert jax.tree.all(jax.tree.map(np.array_equal, before.opt_state.mu, after.opt_state.mu)), what
        assert jax.tree.all(jax.tree.map(np.array_equal, before.opt_state.nu, after.opt_state.nu)), what
        assert after.step == before.step + 1 == after.opt_state.count  # the learning rate stays that of the step
    state, metrics = step(state, to_device(make_batch(seed=2), mesh))
    assert bool(metrics["finite"]) and metrics["learning_rate"] == make_schedule(SECTION, 10)(4)
    assert not jax.tree.all(jax.tree.map(np.array_equal, before.trainable, on_host(state.trainable)))


def test_micro_batch_of_padding_is_not_computed_on_one_cpu():
    """An objective that is not finite without a token shows that it never ran; what is left is the batch's own step."""
    model = Model(CONFIG, "llama", mesh=make_mesh({}, jax.devices()[:1]))
    objective, optimizer = make_sft(model), make_optimizer(SECTION, 10)

    def loss(trainable, frozen, batch, rng):
        total, weight, metrics = objective(trainable, frozen, batch, rng)
        return total / (batch.segment_ids_BL > 0).any(), weight, metrics

    batch = make_batch(rows=4)
    batch = Batch(*(array * (np.arange(4) % 2 == 0)[:, None].astype(array.dtype) for array in batch))
    found = {}
    for name, each, accumulation in (("whole", objective, 1), ("cut", dataclasses.replace(objective, loss=loss), 2)):
        schedule = make_schedule(SECTION, 10)
        step = make_train_step(each, optimizer, schedule, model.mesh, accumulation=accumulation)
        state = init_state(model, model.init(jax.random.key(0)), optimizer, 0, model.mesh)
        found[name] = on_host(step(state, to_device(batch, model.mesh)))
    (whole, metrics), (cut, metrics_cut) = found["whole"], found["cut"]
    assert metrics_cut["finite"] and metrics_cut["tokens"] == metrics["tokens"] == 2 * (L - 2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-6), metrics, metrics_cut)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-6), whole.opt_state.mu, cut.opt_state.mu)


class Table:
    """A model whose hidden states are rows of a table: enough to train an adapter on."""

    mesh = None

    def hidden(self, params, tokens_BL, segment_ids_BL, positions_BL, *, rng=None):
        return params["table"][tokens_BL]

    def unembed(self, params):
        return params["kernel"]

    def head_logits(self, kernel_VD, hidden):
        return hidden @ kernel_VD.T


def test_only_trainable_parameters_move():
    """An adapter: what trains is one addend of the frozen head, and the optimizer holds moments for it alone."""
    mesh, model = make_mesh({}, jax.devices()[:1]), Table()
    table, kernel = np.random.default_rng(0).normal(size=(2, V, 16)).astype(np.float32)
    frozen = jax.device_put({"table": table, "kernel": kernel})
    factor = {"addend": jnp.zeros((V, 16))}

    def merged(trainable, frozen):
        return {**frozen, "kernel": frozen["kernel"] + trainable["addend"]}

    optimizer = make_optimizer(OptimizerSection(learning_rate=1e-2, schedule="constant"), 5, factor)
    objective = make_sft(model, parameters=merged)
    state = init_state(model, factor, optimizer, 0, mesh, frozen=frozen)
    assert jax.tree.structure(state.opt_state.mu) == jax.tree.structure(factor)
    step = make_train_step(objective, optimizer, lambda step: 1e-2, mesh)
    batch, losses = to_device(make_batch(), mesh), []
    for _ in range(3):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses == sorted(losses, reverse=True) and np.any(state.trainable["addend"])
    assert np.array_equal(state.frozen["kernel"], kernel)
    nll_BL, _ = make_eval_step(objective, mesh)(state.trainable, state.frozen, batch)
    weights = np.asarray(batch.loss_weights_BL)
    assert np.sum(weights * nll_BL) / weights.sum() < losses[-1]


@pytest.mark.parametrize(
    "shape, rows, length, accumulation, message",
    [
        ({"fsdp": 8}, 12, 8, 1, r"train\.batch_size: 12 rows.*8 devices.*multiple of 8; nearest: 8 or 16"),
        ({"fsdp": 4, "data": 2}, 8, 8, 2, r"8 rows.*2 micro-batches over 8 devices.*multiple of 16; nearest: 16"),
        ({"context": 8}, 8, 12, 1, r"data\.max_length: rows of 12 tokens.*context=8; nearest: 8 or 16"),
    ],
)
def test_batches_that_cannot_be_cut(shape, rows, length, accumulation, message):
    batch = Batch(*[jax.ShapeDtypeStruct((rows, length), jnp.int32)] * 5)
    with pytest.raises(InputError, match=message):
        check_batch(batch, make_mesh(shape), accumulation)
