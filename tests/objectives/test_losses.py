"""Chunked cross-entropy against full logits in float64, its gradients against automatic ones, its memory."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from itune.models.layers import linear
from itune.objectives.losses import chunked_cross_entropy
from itune.sharding import make_mesh, named
from itune.types import InputError

B, L, D, V = 4, 12, 8, 32


def plain(kernel_VD, hidden):
    return (hidden @ kernel_VD.T).astype(jnp.float32)


def capped(kernel_VD, hidden):
    return 3.0 * jnp.tanh(0.7 * plain(kernel_VD, hidden) / 3.0)


def full_loss(logits_fn, kernel_VD, hidden, targets, weights):
    logits = logits_fn(kernel_VD, hidden)
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * nll)


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    weights = rng.choice([0.0, 0.0, 0.5, 1.0, 2.0], (B, L)).astype(np.float32)
    return (
        rng.normal(size=(V, D)).astype(np.float32),
        rng.normal(size=(B, L, D)).astype(np.float32),
        rng.integers(0, V, (B, L)).astype(np.int32),
        weights,
    )


@pytest.mark.parametrize("logits_fn, chunk, blocks", [
    (plain, 5, 1), (capped, 16, 1), (plain, 1000, 1), (plain, 5, 4), (capped, 16, 5), (plain, 1000, V),
])  # fmt: skip
def test_equals_full_logits_and_their_gradients(inputs, logits_fn, chunk, blocks):
    kernel, hidden, targets, weights = inputs

    def loss(kernel, hidden):
        result = chunked_cross_entropy(logits_fn, kernel, hidden, targets, weights, chunk=chunk, blocks=blocks)
        return 0.5 * result.loss_sum, result

    gradients, result = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(kernel, hidden)
    wanted = jax.jit(jax.grad(lambda k, h: 0.5 * full_loss(logits_fn, k, h, targets, weights), (0, 1)))(kernel, hidden)
    for ours, theirs in zip(gradients, wanted):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)

    logits = np.asarray(logits_fn(kernel, hidden), np.float64)
    nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], -1)[..., 0]
    on = weights > 0
    np.testing.assert_allclose(result.loss_sum, np.sum(weights * nll), rtol=1e-6)
    np.testing.assert_allclose(result.nll, np.where(on, nll, 0), atol=1e-5)
    np.testing.assert_array_equal(result.correct, on & (logits.argmax(-1) == targets))
    forward_only = jax.jit(lambda k, h: loss(k, h)[0])(kernel, hidden)
    np.testing.assert_allclose(forward_only, 0.5 * result.loss_sum, rtol=1e-6)


@pytest.mark.parametrize("sizes", [{}, {"tensor": 2}, {"fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_of_equal_logits_the_first_is_predicted_as_by_argmax(inputs, sizes):
    """Each entry has a twin in the other half of the vocabulary; then all are equal, as those of a collapsed model."""
    kernel, hidden, _, _ = inputs
    mesh = make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))]) if sizes else None
    run = jax.jit(lambda *given: chunked_cross_entropy(plain, *given, np.ones((B, L)), chunk=5, mesh=mesh).correct)
    first = plain(kernel[: V // 2], hidden).argmax(-1)
    kernel = np.concatenate([kernel[: V // 2]] * 2)
    for targets, right in ((first, 1), (first + V // 2, 0)):
        np.testing.assert_array_equal(run(kernel, hidden, targets.astype(np.int32)), np.full((B, L), right))
    targets = np.arange(B * L, dtype=np.int32).reshape(B, L) % V
    np.testing.assert_array_equal(run(0 * kernel, hidden, targets), targets == 0)


def test_no_weight_gives_zero_loss_and_zero_gradients(inputs):
    kernel, hidden, targets, weights = inputs

    def loss(kernel, hidden):
        return chunked_cross_entropy(plain, kernel, hidden, targets, 0 * weights, chunk=5).loss_sum

    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(kernel, hidden)
    assert value == 0
    assert all(not np.any(g) for g in gradients)


def test_head_runs_only_on_chunks_that_hold_weight(inputs):
    kernel, hidden, targets, weights = inputs
    rows = []

    def counted(kernel, hidden):
        jax.debug.callback(lambda: rows.append(hidden.shape[0]))
        return plain(kernel, hidden)

    jax.block_until_ready(chunked_cross_entropy(counted, kernel, hidden, targets, weights, chunk=4))
    jax.effects_barrier()
    assert len(rows) == -(-np.count_nonzero(weights) // 4) < B * L // 4
    assert set(rows) == {4}


def sizes(jaxpr):
    """Number of elements of every value that a jaxpr makes, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (int(np.prod(v.aval.shape)) for v in equation.outvars)
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes(inner)


def test_full_logits_never_exist(inputs):
    kernel, hidden, targets, weights = inputs

    def loss(kernel, hidden):
        return chunked_cross_entropy(plain, kernel, hidden, targets, weights, chunk=8).loss_sum

    full = jax.grad(functools.partial(full_loss, plain, targets=targets, weights=weights))
    assert max(sizes(jax.make_jaxpr(full)(kernel, hidden).jaxpr)) == B * L * V
    assert max(sizes(jax.make_jaxpr(jax.grad(loss, (0, 1)))(kernel, hidden).jaxpr)) <= max(B * L * D, V * D, 8 * V)


def products(jaxpr):
    """(dtype, number of elements) of every matrix product."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield str(equation.outvars[0].aval.dtype), int(np.prod(equation.outvars[0].aval.shape))
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize("blocks", [1, 4])
def test_in_blocks_only_a_block_of_the_kernel_has_a_float32_gradient(inputs, blocks):
    kernel, hidden, targets, weights = inputs
    kernel, hidden = jnp.asarray(kernel, jnp.bfloat16), jnp.asarray(hidden, jnp.bfloat16)

    def logits_fn(kernel, hidden):
        return linear(hidden, kernel, "bfloat16", "float32")

    def loss(kernel, hidden):
        return chunked_cross_entropy(logits_fn, kernel, hidden, targets, weights, chunk=2, blocks=blocks).loss_sum

    step = jax.grad(loss, (0, 1))
    assert max(products(jax.make_jaxpr(step)(kernel, hidden).jaxpr)) == ("float32", V * D // blocks)
    assert [gradient.dtype for gradient in step(kernel, hidden)] == [jnp.bfloat16] * 2


def test_blocks_on_a_mesh_are_refused(inputs):
    with pytest.raises(InputError, match=r"loss\.blocks=4 is for one device, the mesh has 8; set it to 1"):
        chunked_cross_entropy(plain, *inputs, blocks=4, mesh=make_mesh({"fsdp": 8}))


@pytest.mark.parametrize("vocabulary", [V, V - 1, V - 2, 10])
def test_on_a_mesh_as_on_one_device_without_gathering_hidden_or_logits(inputs, vocabulary):
    """A vocabulary that tensor divides, that nothing divides, that fsdp does not divide, and one of few entries."""
    kernel, hidden, targets, weights = inputs
    kernel, targets = kernel[:vocabulary], targets % vocabulary
    mesh = make_mesh({"fsdp": 2, "context": 2, "tensor": 2})

    def loss(kernel, hidden, targets, weights, mesh):
        return chunked_cross_entropy(plain, kernel, hidden, targets, weights, chunk=3, mesh=mesh).loss_sum

    alone = jax.jit(jax.value_and_grad(functools.partial(loss, mesh=None), (0, 1)))
    wanted = alone(kernel, hidden, targets, weights)
    rows = named(mesh, ("batch", "length"))
    hidden_rows = NamedSharding(mesh, PartitionSpec(*rows.spec, None))
    kernel_rows = named(mesh, ("vocab" if vocabulary % 2 == 0 else None, "embed"))
    placed = jax.device_put((kernel, hidden, targets, weights), (kernel_rows, hidden_rows, rows, rows))
    step = jax.jit(jax.value_and_grad(functools.partial(loss, mesh=mesh), (0, 1))).lower(*placed).compile()
    value, gradients = step(*placed)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-6)
    for ours, theirs in zip(gradients, wanted[1]):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)
    gathered = [line for line in step.as_text().splitlines() if " all-gather(" in line]
    assert gathered, "chunks of tokens, or the kernel where there are more tokens than entries, are gathered over fsdp"
    whole = [line for line in gathered if re.search(rf"f32\[{vocabulary // 2},{D}\]", line.split(" all-gather(")[0])]
    assert bool(whole) == (2 * vocabulary < B * L // 2), gathered
    assert all(f"{B},{L}" not in line.split(" all-gather(")[0] for line in gathered), gathered


@pytest.mark.parametrize("blocks", [1, 3])
def test_bfloat16_products_with_float32_losses(inputs, blocks):
    kernel, hidden, targets, weights = inputs
    hidden = jnp.asarray(hidden, jnp.bfloat16)

    def logits_fn(kernel, hidden):
        return linear(hidden, kernel, "bfloat16", "float32")

    def loss(kernel, hidden):
        return chunked_cross_entropy(logits_fn, kernel, hidden, targets, weights, chunk=5, blocks=blocks).loss_sum

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, gradients = step(kernel, hidden)
    assert (value.dtype, *(g.dtype for g in gradients)) == (jnp.float32, jnp.float32, jnp.bfloat16)
    rounded = jnp.asarray(kernel, jnp.bfloat16).astype(jnp.float32), hidden.astype(jnp.float32)
    full = functools.partial(full_loss, plain, targets=targets, weights=weights)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(full, (0, 1)))(*rounded)
    np.testing.assert_allclose(value, wanted, rtol=1e-6)
    for ours, theirs in zip(gradients, wanted_gradients):
        np.testing.assert_allclose(ours.astype(jnp.float32), theirs, atol=0.01 * np.abs(theirs).max())
    products = [line for line in step.lower(kernel, hidden).as_text().splitlines() if "dot_general" in line]
    assert len(products) >= 3
    assert all("xf32>, tensor" not in line for line in products), "float32 operands in a bfloat16 product"
