"""Stochastic rounding: unbiased, one of two neighbours, repeatable; bfloat16 weights learn as float32 weights do."""

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
from itune.rounding import random_bits, round_stochastically, round_tree
from itune.sharding import make_mesh
from itune.step import init_state, make_train_step
from itune.types import Batch, InputError

DRAWS = 20_000


@pytest.mark.parametrize("value", [1.001, -3.3333, 1e-3, 6e-39, 250.2])
def test_the_mean_is_the_value_and_each_draw_a_neighbour(value):
    x = jnp.full(DRAWS, value, jnp.float32)
    drawn = np.asarray(round_stochastically(x, jnp.uint32(7)).astype(jnp.float32), np.float64)
    value = float(np.float32(value))
    below = float((np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    above = float(((np.float32(value).view(np.uint32) & np.uint32(0xFFFF0000)) + np.uint32(1 << 16)).view(np.float32))
    assert set(np.unique(drawn)) == {below, above}
    share = (value - below) / (above - below)
    deviation = np.sqrt(share * (1 - share) / DRAWS) * abs(above - below)
    assert abs(drawn.mean() - value) < 4 * deviation


def test_what_bfloat16_holds_stays_and_what_is_no_number_passes():
    x = jnp.asarray([0.0, -0.0, 1.0, -2.5, 3.3895314e38, np.inf, -np.inf, np.nan], jnp.float32)
    for seed in range(5):
        np.testing.assert_array_equal(round_stochastically(x, jnp.uint32(seed)).astype(jnp.float32), x)


def test_bits_are_uniform_and_differ_by_seed_place_and_path():
    bits = np.asarray(random_bits((64, 1024), jnp.uint32(3)))
    counts = np.bincount((bits >> 24).ravel(), minlength=256)
    assert ((counts - 256) ** 2 / 256).sum() < 255 + 5 * np.sqrt(2 * 255)  # chi squared
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 4 * 0.5 / np.sqrt(bits.size * 32)
    unit = (bits / 2**32 - 0.5).astype(np.float64)
    others = {
        "seed": np.asarray(random_bits((64, 1024), jnp.uint32(4))) / 2**32 - 0.5,
        "row": np.roll(unit, 1, 0), "column": np.roll(unit, 1, 1),
    }  # fmt: skip
    for name, other in others.items():
        assert abs((unit * other).mean() * 12) < 4 / np.sqrt(bits.size), name
    tree = {name: jnp.full(1000, 1.003, jnp.float32) for name in "ab"}
    twins = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    one, again, other = (round_tree(tree, twins, jnp.uint32(seed)) for seed in (1, 1, 2))
    assert np.array_equal(one["a"], again["a"]) and not np.array_equal(one["a"], one["b"])
    assert not np.array_equal(one["a"], other["a"])


CONFIG = ModelConfig(
    vocab_size=48, width=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, mlp_width=64,
    kinds=(LayerKind(),) * 2, max_length=16, init_std=0.1, tie_embeddings=True,
)  # fmt: skip
STEPS = 200
QUICK = {"xla_backend_optimization_level": 0}  # compiling takes most of the time here


def make_batch(step, rows=8, length=16):
    """Sequences that count upward by a step of their own: there is something to learn, and never all of it."""
    rng = np.random.default_rng(step)
    start, by = rng.integers(0, 48, (2, rows, 1))
    ids = ((start + (1 + by % 5) * np.arange(length + 1)) % 48).astype(np.int32)
    ones, positions = np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(ids[:, :-1], ids[:, 1:], ones.astype(np.float32), ones, positions)


SECTION = OptimizerSection(learning_rate=1e-3, schedule="cosine", warmup=10)
NARROW = dataclasses.replace(SECTION, moment_dtype="bfloat16", second_moment_dtype="bfloat16")


class Run:
    """The model with weights of this dtype, its first state on the host and its compiled step: float32 compute, so that
    only the weights' own rounding differs."""

    def __init__(self, section, param_dtype, rounding=False):
        self.mesh = make_mesh({}, jax.devices()[:1])
        model = Model(CONFIG, "llama", param_dtype=param_dtype, mesh=self.mesh)
        optimizer, schedule = make_optimizer(section, STEPS), make_schedule(section, STEPS)
        step = make_train_step(make_sft(model, chunk=64), optimizer, schedule, self.mesh, stochastic_rounding=rounding)
        start = Model(CONFIG, "llama", mesh=self.mesh).init(jax.random.key(0))
        state = init_state(model, jax.tree.map(lambda x: x.astype(param_dtype), start), optimizer, 0, self.mesh)
        self.step = step.lower(state, to_device(make_batch(0), self.mesh)).compile(compiler_options=QUICK)
        self.shardings, self.state = jax.tree.map(lambda x: x.sharding, state), on_host(state)

    def train(self, steps=STEPS, begin=None):
        """(losses, state on the host) after so many steps in all."""
        state = jax.device_put(self.state if begin is None else begin, self.shardings)
        losses = []
        for number in range(int(state.step), steps):
            state, metrics = self.step(state, to_device(make_batch(number), self.mesh))
            losses.append(float(metrics["loss"]))
        return np.array(losses), on_host(state)


def on_host(tree):
    return jax.tree.map(lambda leaf: np.array(leaf, copy=True), tree)


@pytest.fixture(scope="module")
def rounded():
    return Run(NARROW, "bfloat16", rounding=True)


def test_bfloat16_weights_follow_float32_weights(rounded):
    exact, _ = Run(SECTION, "float32").train()
    ours, state = rounded.train()
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.bfloat16.dtype}
    assert {leaf.dtype for leaf in jax.tree.leaves((state.opt_state.mu, state.opt_state.nu))} == {jnp.bfloat16.dtype}
    nearest, _ = Run(SECTION, "bfloat16").train()
    last = slice(-20, None)
    off = [abs(losses[last].mean() / exact[last].mean() - 1) for losses in (ours, nearest)]
    assert exact[last].mean() < 0.7 * exact[0]
    assert off[0] < 0.01 and off[1] > 0.02, off  # rounding to nearest loses the small updates


def test_rounding_repeats_itself_and_goes_on(rounded):
    whole, half = rounded.train(6)[1], rounded.train(3)[1]
    rest = rounded.train(6, begin=half)[1]
    jax.tree.map(np.testing.assert_array_equal, whole, rest)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: not np.array_equal(a, b), whole.trainable, half.trainable)))


def test_a_second_moment_dtype_that_an_optimizer_does_not_have_is_refused():
    with pytest.raises(InputError, match="'sgd' has no setting 'second_moment_dtype'"):
        make_optimizer(OptimizerSection(name="sgd", second_moment_dtype="bfloat16"), 3)
