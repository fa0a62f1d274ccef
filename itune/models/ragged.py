"""Products of rows, sorted by expert, with the kernel of each row's own expert, and the derivatives of these products.

A ragged product as in Megablocks (arXiv 2211.15841). On a mesh the stack of kernels is gathered over fsdp here, in the
compute dtype, and the sums of its gradient are divided over fsdp here, in the stack's own dtype (contract 3): left to
the partitioner they would be summed in the compute dtype, and whole on every device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from itune.models.layers import precision, rounded_here


class _How(NamedTuple):
    compute: str
    x: str
    kernel: str
    cut: int | None  # the dimension of the stack that fsdp divides, inside a shard_map; None where it is whole


def ragged_linear(
    x_SI: jax.Array, kernel_EOI: jax.Array, sizes_E: jax.Array, dtype: Any, cut: int | None = None
) -> jax.Array:
    """x (S, I) times kernels (E, out, in) -> (S, O) in `dtype`: the first sizes[0] rows by kernel 0, and so on.

    Rows after the last expert's give zeros. `cut`: the dimension of `kernel_EOI` of which this device holds a part.
    """
    compute, x, kernel = (jnp.dtype(d).name for d in (dtype, x_SI.dtype, kernel_EOI.dtype))
    how = _How(compute, x, kernel, cut)
    return _ragged(how, x_SI, kernel_EOI, sizes_E)


def whole(how_cut: int | None, stack: jax.Array) -> jax.Array:
    """A stack of which this device holds a part along this dimension, from all devices of the fsdp axis."""
    return stack if how_cut is None else jax.lax.all_gather(stack, "fsdp", axis=how_cut, tiled=True)


def _gathered(how: _How, kernel_EOI: jax.Array) -> jax.Array:
    return whole(how.cut, rounded_here(kernel_EOI, how.compute).astype(how.compute))


def _dot(how: _How, a: jax.Array, b: jax.Array, sizes_E: jax.Array, over: tuple[int, int], out: str) -> jax.Array:
    """The product over these two dimensions: over the rows themselves, one result an expert; else by a row's expert."""
    dimensions = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((over[0],), (over[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[] if over == (0, 0) else [0],
    )
    return jax.lax.ragged_dot_general(
        a, b, sizes_E, dimensions, precision=precision(how.compute), preferred_element_type=jnp.dtype(out)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(how: _How, x_SI: jax.Array, kernel_EOI: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _dot(how, x_SI.astype(how.compute), _gathered(how, kernel_EOI), sizes_E, (1, 2), how.compute)


def _forward(how: _How, x_SI: Any, kernel_EOI: Any, sizes_E: Any) -> Any:
    """Keeps what the backward pass takes: a frozen kernel asks for no x, an x that needs no gradient for no kernel."""
    kept = x_SI.value if kernel_EOI.perturbed else None, kernel_EOI.value if x_SI.perturbed else None, sizes_E.value
    return _ragged(how, x_SI.value, kernel_EOI.value, sizes_E.value), kept


def _backward(how: _How, kept: Any, cotangent: Any) -> Any:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    x_SI, kernel_EOI, sizes_E = kept
    cotangent = cotangent.astype(how.compute)
    dx_SI = dkernel_EOI = None
    if kernel_EOI is not None:
        dx_SI = _dot(how, cotangent, _gathered(how, kernel_EOI), sizes_E, (1, 1), how.x)
    if x_SI is not None:
        dkernel_EOI = _dot(how, cotangent, x_SI.astype(how.compute), sizes_E, (0, 0), how.kernel)
        if how.cut is not None:
            dkernel_EOI = jax.lax.psum_scatter(dkernel_EOI, "fsdp", scatter_dimension=how.cut, tiled=True)
    return dx_SI, dkernel_EOI, None


_ragged.defvjp(_forward, _backward, symbolic_zeros=True)
