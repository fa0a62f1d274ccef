"""Closed forms of the four weightings, through the objective and through the step."""

from __future__ import annotations

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from itune.objectives import make_sft
from itune.objectives.sft import example_weights
from itune.sharding import make_mesh
from itune.step import init_state, make_eval_step, make_train_step
from itune.types import Batch, InputError

V, D = 11, 4


class Bigram:
    """A model by table: the logits of a token depend on that token alone, so losses have closed forms."""

    mesh = None

    def hidden(self, params, tokens_BL, segment_ids_BL, positions_BL, *, rng=None):
        return params["table"][tokens_BL]

    def unembed(self, params):
        return params["kernel"]

    def head_logits(self, kernel_VD, hidden):
        return hidden @ kernel_VD.T

    def logical_axes(self):
        return {"table": (None, None), "kernel": (None, None)}


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(3)
    params = {"table": rng.normal(size=(V, D)).astype(np.float32), "kernel": rng.normal(size=(V, D)).astype(np.float32)}
    # two rows, packed: examples of 3 and 2 tokens and padding; one of 4 tokens, and one without weight
    segments = np.array([[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 2, 2]], np.int32)
    weights = np.array([[0, 1, 1, 0, 0.5, 0], [0, 1, 2, 1, 0, 0]], np.float32)
    tokens, targets = rng.integers(0, V, (2, 2, 6)).astype(np.int32)
    batch = Batch(tokens, targets, weights, segments, np.zeros_like(segments))
    logits = params["table"][tokens].astype(np.float64) @ params["kernel"].astype(np.float64).T
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    correct = logits.argmax(-1) == targets
    return types.SimpleNamespace(params=params, batch=batch, nll=nll, weights=weights, correct=correct)


def closed_forms(case):
    n, w = case.nll, case.weights
    first, second = (w[0] * n[0]).sum(), (w[1] * n[1]).sum()
    means = [(n[0, 1] + n[0, 2]) / 2, n[0, 4], second / 4]  # of the three examples that carry weight
    return {
        "token": (first + second) / 6.5,
        "example": sum(means) / 3,
        "microbatch_mean": (first / 2.5 + second / 4) / 2,  # a row is a micro-batch
        "sum": first + second,
    }


@pytest.mark.parametrize("weighting", ["token", "example", "microbatch_mean", "sum"])
def test_step_minimises_the_closed_form(case, weighting):
    mesh = make_mesh({}, jax.devices()[:1])
    optimizer = optax.sgd(1.0)
    state = init_state(Bigram(), case.params, optimizer, 0, mesh)
    before = jax.device_get(state.trainable)
    objective = make_sft(Bigram(), weighting, chunk=3)
    step = make_train_step(objective, optimizer, lambda step: 1.0, mesh, accumulation=2, clip_norm=0.0)
    state, metrics = step(state, case.batch)
    np.testing.assert_allclose(metrics["loss"], closed_forms(case)[weighting], rtol=1e-6)
    assert int(metrics["supervised_tokens"]) == 6 and int(metrics["tokens"]) == 11
    on = case.weights > 0
    np.testing.assert_allclose(metrics["accuracy"], case.correct[on].mean(), rtol=1e-6)

    def loss(params):  # the same closed form, for its gradient
        logits = params["table"][case.batch.tokens_BL] @ params["kernel"].T
        nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, case.batch.targets_BL[..., None], -1)[..., 0]
        return closed_forms(types.SimpleNamespace(nll=nll, weights=case.weights))[weighting]

    for name, gradient in jax.jit(jax.grad(loss))(before).items():
        np.testing.assert_allclose(before[name] - np.asarray(state.trainable[name]), gradient, atol=2e-6)


def test_weights_of_an_example_sum_to_one(case):
    scaled, count = jax.jit(example_weights)(case.weights, case.batch.segment_ids_BL)
    assert count == 3
    np.testing.assert_allclose(scaled, [[0, 0.5, 0.5, 0, 1, 0], [0, 0.25, 0.5, 0.25, 0, 0]], rtol=1e-6)


@pytest.mark.parametrize("weighting", ["token", "example", "microbatch_mean", "sum"])
def test_a_batch_without_weight_is_finite(case, weighting):
    empty = case.batch._replace(loss_weights_BL=0 * case.weights)
    loss_sum, weight_sum, _ = jax.jit(make_sft(Bigram(), weighting).loss)(case.params, {}, empty, None)
    assert loss_sum == 0 and weight_sum == 0


def test_evaluation_gives_unweighted_losses_by_token(case):
    step = make_eval_step(make_sft(Bigram(), "example"), make_mesh({}, jax.devices()[:1]))
    nll_BL, correct_BL = step(case.params, {}, case.batch)
    np.testing.assert_allclose(nll_BL, np.where(case.weights > 0, case.nll, 0), atol=1e-6)
    np.testing.assert_array_equal(correct_BL, case.correct & (case.weights > 0))


def test_unknown_weighting_names_the_nearest():
    with pytest.raises(InputError, match=r"loss\.weighting.*'tokens'.*nearest: token"):
        make_sft(Bigram(), "tokens")
