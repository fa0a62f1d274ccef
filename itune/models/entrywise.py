"""Norms, biases and gates: what tokens pass between products, with derivatives that keep little.

Left to themselves norms and gates would keep three or four arrays each for the backward pass, some in float32: more
than all products together. These keep their inputs and form the rest again, which costs no product. The gradients of
scales and biases are summed over tokens and devices in their own dtype; in the compute dtype, bfloat16, they would have
the error of a sum over all tokens (contract 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class _Norm(NamedTuple):
    eps: float
    offset: int
    dtype: str
    out: str


def rms_norm(x: jax.Array, scale_D: jax.Array, *, eps: float, offset: int, dtype: Any, out_dtype: Any) -> jax.Array:
    """x (..., D) over its root mean square, times scale_D + offset (arXiv 1910.07467), in `out_dtype`.

    The statistics are float32; the normed entries are rounded to `dtype`, in which the scale is applied.
    """
    return _rms_norm(_Norm(eps, offset, jnp.dtype(dtype).name, jnp.dtype(out_dtype).name), x, scale_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rms_norm(norm: _Norm, x: jax.Array, scale_D: jax.Array) -> jax.Array:
    return _norm_forward(norm, x, scale_D)[0]


def _norm_forward(norm: _Norm, x: jax.Array, scale_D: jax.Array) -> Any:
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + norm.eps)
    y = (x32 * inverse).astype(norm.dtype) * _factor(norm, scale_D)
    return y.astype(norm.out), (x, inverse, scale_D)


def _norm_backward(norm: _Norm, kept: Any, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, inverse, scale_D = kept
    cotangent = cotangent.astype(norm.dtype)
    normed32 = x.astype(jnp.float32) * inverse
    dscale_D = _over_tokens(scale_D.dtype, cotangent, normed32.astype(norm.dtype))
    d32 = (cotangent * _factor(norm, scale_D)).astype(jnp.float32)
    dx32 = inverse * (d32 - normed32 * jnp.mean(d32 * normed32, axis=-1, keepdims=True))
    return dx32.astype(x.dtype), dscale_D


def _factor(norm: _Norm, scale_D: jax.Array) -> jax.Array:
    scale_D = scale_D.astype(norm.dtype)
    return scale_D + norm.offset if norm.offset else scale_D


def shifted(x: jax.Array, bias_D: jax.Array) -> jax.Array:
    """x (..., D) plus bias_D, in the dtype of x."""
    return _shifted(bias_D.dtype.name, x, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted(dtype: str, x: jax.Array, bias_D: jax.Array) -> jax.Array:
    return x + bias_D.astype(x.dtype)


def _shifted_forward(dtype: str, x: jax.Array, bias_D: jax.Array) -> Any:
    return _shifted(dtype, x, bias_D), None


def _shifted_backward(dtype: str, _: None, cotangent: jax.Array) -> Any:
    return cotangent, _over_tokens(dtype, cotangent)


def _over_tokens(dtype: Any, *factors: jax.Array) -> jax.Array:
    """The product of the factors (..., D), formed in float32, summed over all axes but the last."""
    product = functools.reduce(jnp.multiply, (factor.astype(jnp.float32) for factor in factors))
    return jnp.sum(product, axis=tuple(range(product.ndim - 1))).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def gated(activation: Callable[[jax.Array], jax.Array], gate: jax.Array, up: jax.Array) -> jax.Array:
    """activation(gate) * up, entry by entry."""
    return activation(gate) * up


def _gated_forward(activation: Any, gate: jax.Array, up: jax.Array) -> Any:
    return gated(activation, gate, up), (gate, up)


def _gated_backward(activation: Any, kept: Any, cotangent: jax.Array) -> Any:
    return jax.vjp(lambda gate, up: activation(gate) * up, *kept)[1](cotangent)


_rms_norm.defvjp(_norm_forward, _norm_backward)
_shifted.defvjp(_shifted_forward, _shifted_backward)
gated.defvjp(_gated_forward, _gated_backward)
