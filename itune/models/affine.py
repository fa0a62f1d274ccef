"""Scale and shift of every token by a vector, whose gradients are summed over tokens and devices in the vector's dtype.

Left to themselves they would be summed in the compute dtype: in bfloat16, with the error of a sum over all tokens, and
between devices too (contract 3).
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero


def scaled(x: jax.Array, scale_D: jax.Array, offset: int = 0) -> jax.Array:
    """x (..., D) times (scale_D + offset), all in the dtype of x."""
    return _scaled((offset, scale_D.dtype.name), x, scale_D)


def shifted(x: jax.Array, bias_D: jax.Array) -> jax.Array:
    """x (..., D) plus bias_D, in the dtype of x."""
    return _shifted(bias_D.dtype.name, x, bias_D)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scaled(static: tuple[int, str], x: jax.Array, scale_D: jax.Array) -> jax.Array:
    scale_D = scale_D.astype(x.dtype)
    return (scale_D + static[0] if static[0] else scale_D) * x


def _scaled_forward(static: tuple[int, str], x: Any, scale_D: Any) -> Any:
    """Keeps what the backward pass takes: a frozen scale asks for no x."""
    kept = x.value if scale_D.perturbed else None, scale_D.value if x.perturbed else None
    return _scaled(static, x.value, scale_D.value), kept


def _scaled_backward(static: tuple[int, str], kept: Any, cotangent: Any) -> Any:
    if isinstance(cotangent, SymbolicZero):
        return None, None
    x, scale_D = kept
    dx = None if scale_D is None else _scaled(static, cotangent, scale_D)
    return dx, None if x is None else _over_tokens(static[1], cotangent, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _shifted(dtype: str, x: jax.Array, bias_D: jax.Array) -> jax.Array:
    return x + bias_D.astype(x.dtype)


def _shifted_forward(dtype: str, x: jax.Array, bias_D: jax.Array) -> Any:
    return _shifted(dtype, x, bias_D), None


def _shifted_backward(dtype: str, _: None, cotangent: jax.Array) -> Any:
    return cotangent, _over_tokens(dtype, cotangent)


def _over_tokens(dtype: str, *factors: jax.Array) -> jax.Array:
    """The product of the factors (..., D), formed in float32, summed over all axes but the last."""
    product = functools.reduce(jnp.multiply, (factor.astype(jnp.float32) for factor in factors))
    return jnp.sum(product, axis=tuple(range(product.ndim - 1))).astype(dtype)


_scaled.defvjp(_scaled_forward, _scaled_backward, symbolic_zeros=True)
_shifted.defvjp(_shifted_forward, _shifted_backward)
