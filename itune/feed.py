"""Host batches -> device arrays, two steps ahead of the step that uses them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from itune.sharding import batch_sharding
from itune.types import Batch


def to_device(batch: Batch, mesh: Mesh, first_row: int = 0, rows: int = 0) -> Batch:
    """`batch` on the mesh, rows over data and fsdp, length over context.

    With several processes each gives the rows that its devices hold (`setup_run.local_rows`), whole: they begin at
    `first_row` of the global batch's `rows`. Others may hold the same rows (tensor, context), or rows between them.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return Batch(*jax.device_put(tuple(batch), sharding))

    def place(array: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return array[start - first_row : stop - first_row, *index[1:]]

        shape = (rows or len(array), *array.shape[1:])
        return jax.make_array_from_callback(shape, sharding, part)

    return Batch(*(place(array) for array in batch))


def feed(
    batches: Iterable[tuple[int, Batch]], mesh: Mesh, ahead: int = 2, *, first_row: int = 0, rows: int = 0
) -> Iterator[tuple[int, Batch]]:
    """(step, device Batch) for every (step, host Batch), with up to `ahead` transfers under way; rows as `to_device`.

    Transfers are asynchronous. The arrays of a host batch must not be written to afterwards: on CPU they may be shared.
    """
    waiting: collections.deque[Any] = collections.deque()
    for step, batch in batches:
        waiting.append((step, to_device(batch, mesh, first_row, rows)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
