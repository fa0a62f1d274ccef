"""Where the rows of experts stand, sorted by expert, and which rows are multiplied together (see ragged.py)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = (8, 512)  # rows, at least and at most


class Tiles(NamedTuple):
    """The expert of each tile, by turn (of which the first `turns` are in use) and tile in it. All tiles have as many
    rows."""

    expert_UN: jax.Array
    turns: jax.Array


class Groups(NamedTuple):
    """Which rows belong to which expert: the first sizes[0] rows to expert 0, and so on, unless there are tiles."""

    sizes_E: jax.Array
    tiles: Tiles | None = None


def sort(expert_S: jax.Array, count: int, batch: int, ways: int = 1) -> tuple[jax.Array, jax.Array, Groups]:
    """Places for the rows of `count` experts: `expert_S` (S,) holds each row's own, or `count` for none of these.

    `batch`: tiles that are multiplied at a time, 0 for a ragged product. `ways`: devices that share all experts.
    Returns row_P, which row stands at each place (S, where none does), expert_P, its expert (`count` where none does),
    and the groups.
    """
    order_S = jnp.argsort(expert_S)  # stable; rows of none of these come last
    sorted_S = expert_S[order_S]
    sizes_E = jnp.bincount(expert_S, length=count + 1)[:count].astype(jnp.int32)
    if not batch:
        return order_S, sorted_S, Groups(sizes_E)
    rows, enough = _tiles_for(len(expert_S), count, ways)
    batch = min(batch, count, enough)
    number = -(-enough // batch) * batch
    tiles_E = -(-sizes_E // rows)
    ends_E = jnp.cumsum(tiles_E)
    expert_N = jnp.minimum(jnp.searchsorted(ends_E, jnp.arange(number), side="right"), count - 1)
    ahead_E = (ends_E - tiles_E) * rows - (jnp.cumsum(sizes_E) - sizes_E)  # empty places before an expert's rows
    place_S = jnp.arange(len(expert_S)) + ahead_E[jnp.minimum(sorted_S, count - 1)]
    place_S = jnp.where(sorted_S < count, place_S, number * rows)  # out of range, and so dropped
    row_P = jnp.full(number * rows, len(expert_S), order_S.dtype).at[place_S].set(order_S, mode="drop")
    expert_P = jnp.full(number * rows, count, sorted_S.dtype).at[place_S].set(sorted_S, mode="drop")
    return row_P, expert_P, Groups(sizes_E, Tiles(expert_N.reshape(-1, batch), -(-ends_E[-1] // batch)))


def _tiles_for(rows: int, count: int, ways: int) -> tuple[int, int]:
    """Rows of a tile, at most about half of what an expert has on average, so that about a quarter more rows are
    multiplied than there are; and how many tiles are enough, however the rows fall: half as many places again."""
    tile = min(max(TILE[0], 1 << (max(rows // (2 * count * ways), 1).bit_length() - 1)), TILE[1])
    begun = min(count, rows)  # experts whose last tile is not full
    return tile, max((rows - begun) // tile + begun, 1)
