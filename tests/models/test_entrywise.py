"""Norms, biases and gates: values and gradients of the plain expressions, little kept, sums in the vector's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.models.entrywise import gated, rms_norm, shifted
from itune.models.layers import ACTIVATIONS

TOKENS, WIDTH = 4096, 8


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, TOKENS // 2, WIDTH)), jnp.bfloat16) for _ in range(2))
    return x, cotangent, jnp.asarray(rng.normal(size=WIDTH), jnp.float32)


def norm(x, scale_D, offset=0, dtype="bfloat16"):
    return rms_norm(x, scale_D, eps=1e-5, offset=offset, dtype=dtype, out_dtype=x.dtype)


def plain_norm(x, scale_D, offset=0, dtype="bfloat16"):
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-5)
    return (x32.astype(dtype) * (scale_D.astype(dtype) + offset)).astype(x.dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("offset", [0, 1])
def test_a_norm_and_its_input_gradient_are_those_of_the_plain_expression(inputs, offset, dtype):
    x, cotangent, scale_D = inputs
    value, pull = jax.vjp(lambda x, scale_D: norm(x, scale_D, offset, dtype), x, scale_D)
    plain, plain_pull = jax.vjp(lambda x, scale_D: plain_norm(x, scale_D, offset, dtype), x, scale_D)
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_allclose(*(p(cotangent)[0].astype(jnp.float32) for p in (pull, plain_pull)), rtol=0.01, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, TOKENS // 2, WIDTH), (4, TOKENS // 16, 4, WIDTH)], ids=["width", "heads"])
@pytest.mark.parametrize("offset", [0, 1])
def test_gradients_of_a_norm_in_float32(inputs, offset, shape):
    x, cotangent = (a.astype(jnp.float32).reshape(shape) for a in inputs[:2])
    ours, plain = (
        jax.vjp(lambda x, s: function(x, s, offset, "float32"), x, inputs[2])[1](cotangent)  # noqa: B023
        for function in (norm, plain_norm)
    )
    for a, b in zip(ours, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


def test_a_shift_is_a_plain_sum(inputs):
    x, cotangent, bias_D = inputs
    value, pull = jax.vjp(shifted, x, bias_D)
    np.testing.assert_array_equal(value, x + bias_D.astype(x.dtype))
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)


def test_gradients_of_the_vectors_are_sums_in_float32(inputs):
    """The plain expression's are rounded to bfloat16: 3 digits of a sum over all tokens."""
    x, cotangent, scale_D = inputs
    ones = jnp.ones(WIDTH)
    exact, normed = np.asarray(cotangent, np.float64), np.asarray(plain_norm(x, ones), np.float64)
    for function, wanted in ((norm, exact * normed), (shifted, exact)):
        gradient = jax.vjp(function, x, scale_D)[1](cotangent)[1]
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, wanted.sum((0, 1)), atol=1e-4)
    rounded = jax.vjp(plain_norm, x, scale_D)[1](cotangent)[1]
    assert np.abs(rounded - (exact * normed).sum((0, 1))).max() > 1e-2


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_gate_and_its_gradients_are_those_of_the_plain_product(inputs, name):
    gate, up, _ = inputs
    value, pull = jax.vjp(lambda gate, up: gated(ACTIVATIONS[name], gate, up), gate, up)
    plain, plain_pull = jax.vjp(lambda gate, up: ACTIVATIONS[name](gate) * up, gate, up)
    np.testing.assert_array_equal(value, plain)
    for a, b in zip(pull(up), plain_pull(up), strict=True):
        np.testing.assert_array_equal(a, b)


def test_inputs_are_all_that_is_kept(inputs):
    x, up, scale_D = inputs
    plain = jax.vjp(plain_norm, x, scale_D)[1], jax.vjp(lambda gate, up: jax.nn.silu(gate) * up, x, up)[1]
    ours = jax.vjp(norm, x, scale_D)[1], jax.vjp(lambda gate, up: gated(jax.nn.silu, gate, up), x, up)[1]
    kept, plainly = ([_bytes(pull) for pull in pulls] for pulls in (ours, plain))
    assert kept[0] <= x.nbytes + 4 * TOKENS + 100  # and a float32 a token
    assert kept[1] == 2 * x.nbytes
    assert plainly[0] > 3 * x.nbytes and plainly[1] > 3 * x.nbytes


def _bytes(pull):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pull))
