"""Host batches -> device arrays, two steps ahead of the step that uses them."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from itune.sharding import batch_sharding
from itune.types import Batch


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """`batch` on the mesh, rows over data and fsdp, length over context.

    With several processes each gives its own rows (`Loader.rows`) in the order of the processes.
    """
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return Batch(*jax.device_put(tuple(batch), sharding))
    return Batch(*(jax.make_array_from_process_local_data(sharding, array) for array in batch))


def feed(batches: Iterable[tuple[int, Batch]], mesh: Mesh, ahead: int = 2) -> Iterator[tuple[int, Batch]]:
    """(step, device Batch) for every (step, host Batch), with up to `ahead` transfers under way.

    Transfers are asynchronous. The arrays of a host batch must not be written to afterwards: on CPU they may be shared.
    """
    waiting: collections.deque[Any] = collections.deque()
    for step, batch in batches:
        waiting.append((step, to_device(batch, mesh)))
        if len(waiting) > ahead:
            yield waiting.popleft()
    yield from waiting
