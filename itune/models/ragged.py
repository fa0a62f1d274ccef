"""Products of rows, sorted by expert, with the kernel of each row's own expert, and the derivatives of these products.

On a TPU they are ragged products (as in Megablocks, arXiv 2211.15841), which its compiler computes well. Elsewhere XLA
would multiply every row by every expert. There each expert's rows begin at a multiple of a tile (`groups.py`), and some
tiles at a time are multiplied, each by a copy of its expert's kernel.

On a mesh the stack of kernels is gathered over fsdp here, in the compute dtype, and the sums of its gradient are
divided over fsdp here, in the stack's own dtype (contract 3): left to the partitioner they would be summed in the
compute dtype, and whole on every device.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from itune.models.groups import Groups
from itune.models.layers import precision, rounded_here


class _How(NamedTuple):
    compute: str
    x: str
    kernel: str
    cut: int | None  # the dimension of the stack that fsdp divides, inside a shard_map; None where it is whole


def ragged_linear(
    x_PI: jax.Array, kernel_EOI: jax.Array, groups: Groups, dtype: Any, cut: int | None = None
) -> jax.Array:
    """x (P, I) times kernels (E, out, in) -> (P, O) in `dtype`, each row by the kernel of its expert.

    What rows without an expert give is not defined, and their cotangents must be 0. `cut`: the dimension of
    `kernel_EOI` of which this device holds a part.
    """
    compute, x, kernel = (jnp.dtype(d).name for d in (dtype, x_PI.dtype, kernel_EOI.dtype))
    return _ragged(_How(compute, x, kernel, cut), x_PI, kernel_EOI, groups)


def whole(cut: int | None, stack: jax.Array) -> jax.Array:
    """A stack of which this device holds a part along this dimension, from all devices of the fsdp axis."""
    return stack if cut is None else jax.lax.all_gather(stack, "fsdp", axis=cut, tiled=True)


def _gathered(how: _How, kernel_EOI: jax.Array) -> jax.Array:
    return whole(how.cut, rounded_here(kernel_EOI, how.compute).astype(how.compute))


def _settings(how: _How, out: str) -> dict[str, Any]:
    return {"precision": precision(how.compute), "preferred_element_type": jnp.dtype(out)}


def _by_row(how: _How, x_PI: jax.Array, kernel: jax.Array, groups: Groups, over: int, out: str) -> jax.Array:
    """Each row times its expert's kernel, summed over this dimension of the kernel."""
    settings = _settings(how, out)
    if groups.tiles is None:
        dimensions = jax.lax.RaggedDotDimensionNumbers((((1,), (over,)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x_PI, kernel, groups.sizes_E, dimensions, **settings)
    expert_UN, turns = groups.tiles
    x_UNRI = x_PI.reshape(*expert_UN.shape, -1, x_PI.shape[1])

    def turn(number: jax.Array, y_UNRO: jax.Array) -> jax.Array:
        kernels = kernel[expert_UN[number]]
        y_NRO = jax.lax.dot_general(x_UNRI[number], kernels, (((2,), (over,)), ((0,), (0,))), **settings)
        return y_UNRO.at[number].set(y_NRO)

    y_UNRO = jnp.zeros((*x_UNRI.shape[:3], kernel.shape[3 - over]), out)
    return jax.lax.fori_loop(0, turns, turn, y_UNRO).reshape(len(x_PI), -1)


def _by_expert(how: _How, a_PO: jax.Array, b_PI: jax.Array, groups: Groups) -> jax.Array:
    """(E, O, I): products of rows, summed over the rows of each expert."""
    if groups.tiles is None:
        dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(a_PO, b_PI, groups.sizes_E, dimensions, **_settings(how, how.kernel))
    settings = _settings(how, "float32")  # summed over tiles, so never in bfloat16
    expert_UN, turns = groups.tiles
    a_UNRO, b_UNRI = (x.reshape(*expert_UN.shape, -1, x.shape[1]) for x in (a_PO, b_PI))

    def turn(number: jax.Array, sum_EOI: jax.Array) -> jax.Array:
        one_NOI = jax.lax.dot_general(a_UNRO[number], b_UNRI[number], (((1,), (1,)), ((0,), (0,))), **settings)
        return sum_EOI.at[expert_UN[number]].add(one_NOI)

    none_EOI = jnp.zeros((len(groups.sizes_E), a_PO.shape[1], b_PI.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, turns, turn, none_EOI).astype(how.kernel)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ragged(how: _How, x_PI: jax.Array, kernel_EOI: jax.Array, groups: Groups) -> jax.Array:
    return _by_row(how, x_PI.astype(how.compute), _gathered(how, kernel_EOI), groups, 2, how.compute)


def _forward(how: _How, x_PI: Any, kernel_EOI: Any, groups: Any) -> Any:
    """Keeps what the backward pass takes: a frozen kernel asks for no x, an x that needs no gradient for no kernel."""
    groups = jax.tree.map(lambda leaf: leaf.value, groups, is_leaf=lambda leaf: hasattr(leaf, "perturbed"))
    kept = x_PI.value if kernel_EOI.perturbed else None, kernel_EOI.value if x_PI.perturbed else None, groups
    return _ragged(how, x_PI.value, kernel_EOI.value, groups), kept


def _backward(how: _How, kept: Any, cotangent: Any) -> Any:
    if isinstance(cotangent, SymbolicZero):
        return None, None, None
    x_PI, kernel_EOI, groups = kept
    cotangent = cotangent.astype(how.compute)
    dx_PI = dkernel_EOI = None
    if kernel_EOI is not None:
        dx_PI = _by_row(how, cotangent, _gathered(how, kernel_EOI), groups, 1, how.x)
    if x_PI is not None:
        dkernel_EOI = _by_expert(how, cotangent, x_PI.astype(how.compute), groups)
        if how.cut is not None:
            dkernel_EOI = jax.lax.psum_scatter(dkernel_EOI, "fsdp", scatter_dimension=how.cut, tiled=True)
    return dx_PI, dkernel_EOI, None


_ragged.defvjp(_forward, _backward, symbolic_zeros=True)
