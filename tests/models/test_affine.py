"""Scale and shift of tokens: values as plain products, gradients summed in the vector's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.models.affine import scaled, shifted

TOKENS, WIDTH = 4096, 8


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, TOKENS // 2, WIDTH)), jnp.bfloat16) for _ in range(2))
    return x, cotangent, jnp.asarray(rng.normal(size=WIDTH), jnp.float32)


@pytest.mark.parametrize("offset", [0, 1])
def test_values_and_input_gradients_are_those_of_the_plain_product(inputs, offset):
    x, cotangent, scale_D = inputs
    value, pull = jax.vjp(lambda x, scale_D: scaled(x, scale_D, offset), x, scale_D)
    plain, plain_pull = jax.vjp(lambda x, scale_D: (scale_D.astype(x.dtype) + offset) * x, x, scale_D)
    np.testing.assert_array_equal(value, plain)
    np.testing.assert_array_equal(pull(cotangent)[0], plain_pull(cotangent)[0])
    value, pull = jax.vjp(shifted, x, scale_D)
    np.testing.assert_array_equal(value, x + scale_D.astype(x.dtype))
    np.testing.assert_array_equal(pull(cotangent)[0], cotangent)


def test_gradients_of_the_vectors_are_sums_in_float32(inputs):
    """The plain product's are rounded to bfloat16: 3 digits of a sum over all tokens."""
    x, cotangent, scale_D = inputs
    exact = np.asarray(cotangent, np.float64), np.asarray(x, np.float64)
    for function, wanted in ((scaled, exact[0] * exact[1]), (shifted, exact[0])):
        gradient = jax.vjp(function, x, scale_D)[1](cotangent)[1]
        assert gradient.dtype == jnp.float32
        np.testing.assert_allclose(gradient, wanted.sum((0, 1)), atol=1e-4)
    rounded = jax.vjp(lambda x, scale_D: scale_D.astype(x.dtype) * x, x, scale_D)[1](cotangent)[1]
    assert np.abs(rounded - (exact[0] * exact[1]).sum((0, 1))).max() > 1e-2


def test_a_frozen_scale_keeps_no_input(inputs):
    x, _, scale_D = inputs
    kept = jax.tree.leaves(jax.vjp(lambda x: scaled(x, scale_D), x)[1])
    assert TOKENS * WIDTH not in [leaf.size for leaf in kept]
    kept = jax.tree.leaves(jax.vjp(scaled, x, scale_D)[1])
    assert TOKENS * WIDTH in [leaf.size for leaf in kept]
