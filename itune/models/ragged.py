"""Products of rows, sorted by expert, with the kernel of each row's own expert, and the derivatives of these products.

On a TPU they are ragged products (as in Megablocks, arXiv 2211.15841), which its compiler computes well. Elsewhere XLA
would multiply every row by every expert. There each expert's rows begin at a multiple of a tile, a few more rows in
all, and tiles are multiplied in batches, each by a copy of its expert's kernel.

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

from itune.models.layers import precision, rounded_here

TILE = (8, 512)  # rows, at least and at most


class Tiles(NamedTuple):
    """The expert of each of N equal tiles, and how many of them are in use, the first."""

    expert_N: jax.Array
    used: jax.Array


class Groups(NamedTuple):
    """Which rows belong to which expert: the first sizes[0] rows to expert 0, and so on, unless there are tiles."""

    sizes_E: jax.Array
    tiles: Tiles | None = None


def sort(expert_S: jax.Array, count: int, tiled: bool) -> tuple[jax.Array, jax.Array, Groups]:
    """Places for the rows of `count` experts: `expert_S` (S,) holds each row's own, or `count` for none of these.

    Returns row_P, which row stands at each place (any, where none does), expert_P, its expert (`count` where none
    does), and the groups.
    """
    order_S = jnp.argsort(expert_S)  # stable; rows of none of these come last
    sorted_S = expert_S[order_S]
    sizes_E = jnp.bincount(expert_S, length=count + 1)[:count].astype(jnp.int32)
    if not tiled:
        return order_S, sorted_S, Groups(sizes_E)
    number, rows = _tiles_for(len(expert_S), count)
    tiles_E = -(-sizes_E // rows)
    ends_E = jnp.cumsum(tiles_E)
    expert_N = jnp.minimum(jnp.searchsorted(ends_E, jnp.arange(number), side="right"), count - 1)
    ahead_E = (ends_E - tiles_E) * rows - (jnp.cumsum(sizes_E) - sizes_E)  # empty places before an expert's rows
    place_S = jnp.arange(len(expert_S)) + ahead_E[jnp.minimum(sorted_S, count - 1)]
    place_S = jnp.where(sorted_S < count, place_S, number * rows)  # out of range, and so dropped
    row_P = jnp.zeros(number * rows, order_S.dtype).at[place_S].set(order_S, mode="drop")
    expert_P = jnp.full(number * rows, count, sorted_S.dtype).at[place_S].set(sorted_S, mode="drop")
    return row_P, expert_P, Groups(sizes_E, Tiles(expert_N, ends_E[-1]))


def _tiles_for(rows: int, count: int) -> tuple[int, int]:
    """How many tiles are enough however the rows fall, in whole turns, and the rows of one: at most about half of what
    an expert has on average, so that a quarter of the places is empty."""
    tile = min(max(TILE[0], 1 << (max(rows // (2 * count), 1).bit_length() - 1)), TILE[1])
    begun = min(count, rows)  # experts whose last tile is not full
    enough = (rows - begun) // tile + begun
    batch = min(count, enough)
    return -(-enough // batch) * batch, tile


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


def _by_row(how: _How, x_PI: jax.Array, kernel: jax.Array, groups: Groups, over: int, out: str) -> jax.Array:
    """Each row times its expert's kernel, summed over this dimension of the kernel."""
    settings: dict[str, Any] = {"precision": precision(how.compute), "preferred_element_type": jnp.dtype(out)}
    if groups.tiles is None:
        dimensions = jax.lax.RaggedDotDimensionNumbers((((1,), (over,)), ((), ())), [0], [0])
        return jax.lax.ragged_dot_general(x_PI, kernel, groups.sizes_E, dimensions, **settings)
    expert_N, turns, batch = _turns(groups.tiles, kernel.shape[0])
    x_NRI = x_PI.reshape(len(expert_N), -1, x_PI.shape[1])

    def turn(number: jax.Array, y_NRO: jax.Array) -> jax.Array:
        x_CRI, expert_C = (jax.lax.dynamic_slice_in_dim(a, number * batch, batch) for a in (x_NRI, expert_N))
        y_CRO = jax.lax.dot_general(x_CRI, kernel[expert_C], (((2,), (over,)), ((0,), (0,))), **settings)
        return jax.lax.dynamic_update_slice_in_dim(y_NRO, y_CRO, number * batch, 0)

    y_NRO = jnp.zeros((*x_NRI.shape[:2], kernel.shape[3 - over]), out)
    return jax.lax.fori_loop(0, turns, turn, y_NRO).reshape(len(x_PI), -1)


def _by_expert(how: _How, a_PO: jax.Array, b_PI: jax.Array, groups: Groups, count: int) -> jax.Array:
    """(E, O, I): products of rows, summed over the rows of each expert."""
    settings: dict[str, Any] = {"precision": precision(how.compute), "preferred_element_type": jnp.dtype(how.kernel)}
    if groups.tiles is None:
        dimensions = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), [0], [])
        return jax.lax.ragged_dot_general(a_PO, b_PI, groups.sizes_E, dimensions, **settings)
    expert_N, turns, batch = _turns(groups.tiles, count)
    a_NRO, b_NRI = (x.reshape(len(expert_N), -1, x.shape[1]) for x in (a_PO, b_PI))

    def turn(number: jax.Array, sum_EOI: jax.Array) -> jax.Array:
        a_CRO, b_CRI, expert_C = (
            jax.lax.dynamic_slice_in_dim(x, number * batch, batch) for x in (a_NRO, b_NRI, expert_N)
        )
        return sum_EOI.at[expert_C].add(jax.lax.dot_general(a_CRO, b_CRI, (((1,), (1,)), ((0,), (0,))), **settings))

    return jax.lax.fori_loop(0, turns, turn, jnp.zeros((count, a_PO.shape[1], b_PI.shape[1]), how.kernel))


def _turns(tiles: Tiles, count: int) -> tuple[jax.Array, jax.Array, int]:
    """The experts of the tiles, in how many turns those in use are multiplied, and how many a turn: about as many
    copies of kernels as there are kernels."""
    batch = min(count, len(tiles.expert_N))
    return tiles.expert_N, -(-tiles.used // batch), batch


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
        count = groups.sizes_E.shape[0]
        dkernel_EOI = _by_expert(how, cotangent, x_PI.astype(how.compute), groups, count)
        if how.cut is not None:
            dkernel_EOI = jax.lax.psum_scatter(dkernel_EOI, "fsdp", scatter_dimension=how.cut, tiled=True)
    return dx_PI, dkernel_EOI, None


_ragged.defvjp(_forward, _backward, symbolic_zeros=True)
