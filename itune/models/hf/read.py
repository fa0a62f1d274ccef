"""Read a planned checkpoint: each device's slices, converted and stacked straight into the buffer that goes to it."""

from __future__ import annotations

import logging
import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from itune.models.hf.files import DTYPES, Tensor
from itune.models.hf.plan import EMBEDDING, HEAD, Plan, stack_shape
from itune.models.model import Model

log = logging.getLogger("itune")

CHUNK = 64 << 20  # bytes of a file mapped at one time by one thread
THREADS = 4


def read_params(model: Model, plan: Plan, count: Callable[[int], None] | None = None) -> Any:
    """The parameters, placed on the model's mesh. `count` is told the bytes of every slice read."""
    shardings = model.shardings()
    with ThreadPoolExecutor(THREADS) as pool:

        def read(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: Any = None) -> jax.Array:
            name = "/".join(entry.key for entry in path)
            reader = LeafReader(name, leaf, plan.leaves[name], pool, count, len(stack_shape(model, name, leaf)))
            if sharding is None:
                return jnp.asarray(reader((slice(None),) * len(leaf.shape)))
            return jax.make_array_from_callback(leaf.shape, sharding, reader)

        trees = [model.abstract_params()] + ([] if shardings is None else [shardings])
        return jax.tree_util.tree_map_with_path(read, *trees)


class LeafReader:
    """Callable: index of a shard -> its values, as jax.make_array_from_callback asks for them."""

    def __init__(
        self,
        name: str,
        leaf: Any,
        tensors: tuple[Tensor, ...],
        pool: ThreadPoolExecutor,
        count: Any = None,
        stacked: int = 0,
    ):
        self.leaf, self.tensors, self.pool, self.count = leaf, tensors, pool, count
        self.stacked = stacked  # leading dimensions with a tensor for each of their entries
        rows = tensors[0].shape[0]
        self.grown = name in (EMBEDDING, HEAD) and leaf.shape[0] > rows
        if self.grown:
            self.mean = mean_row(tensors[0])
            log.info(
                "%s: %d rows added to the %d of the checkpoint, each the mean of those",
                name,
                leaf.shape[0] - rows,
                rows,
            )

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None  # None is for extended dtypes only
        bounds = [slice(*part.indices(size)) for part, size in zip(index, self.leaf.shape, strict=True)]
        out = np.empty([part.stop - part.start for part in bounds], self.leaf.dtype)
        if self.stacked:
            places = np.arange(len(self.tensors)).reshape(self.leaf.shape[: self.stacked])
            wanted = places[tuple(bounds[: self.stacked])].reshape(-1)
            jobs = list(zip(wanted, out.reshape(-1, *out.shape[self.stacked :]), strict=True))
            inner = bounds[self.stacked :]
            list(self.pool.map(lambda job: read_slice(self.tensors[job[0]], inner, job[1], self.count), jobs))
        elif self.grown:
            self._read_grown(bounds, out)
        else:
            read_slice(self.tensors[0], bounds, out, self.count)
        return out

    def _read_grown(self, bounds: list[slice], out: np.ndarray) -> None:
        rows, (part, columns) = self.tensors[0].shape[0], bounds
        old = max(0, min(part.stop, rows) - part.start)
        if old:
            read_slice(self.tensors[0], [slice(part.start, part.start + old), columns], out[:old], self.count)
        out[old:] = self.mean[columns]


def read_slice(
    tensor: Tensor, bounds: list[slice], out: np.ndarray, count: Callable[[int], None] | None = None
) -> None:
    """Copy tensor[bounds] into `out`, converting to its dtype. Maps at most CHUNK bytes of the file at a time."""
    dtype = DTYPES[tensor.dtype]
    if out.size == 0:
        return
    row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
    step = max(1, CHUNK // row_bytes)
    with open(tensor.file, "rb") as stream:
        for first in range(bounds[0].start, bounds[0].stop, step):
            last = min(first + step, bounds[0].stop)
            begin = tensor.start + first * row_bytes
            page = begin - begin % mmap.ALLOCATIONGRANULARITY
            size = begin - page + (last - first) * row_bytes
            with mmap.mmap(stream.fileno(), size, offset=page, access=mmap.ACCESS_READ) as view:
                _copy(
                    view,
                    begin - page,
                    (last - first, *tensor.shape[1:]),
                    dtype,
                    bounds,
                    out[first - bounds[0].start :][: last - first],
                )
    if count is not None:
        count(out.size * dtype.itemsize)


def _copy(
    view: mmap.mmap, offset: int, shape: tuple[int, ...], dtype: np.dtype, bounds: list[slice], out: np.ndarray
) -> None:
    # a function of its own, so that no array refers to the map when it is closed
    rows = np.frombuffer(view, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
    convert(rows[(slice(None), *bounds[1:])], out)


def convert(source: np.ndarray, out: np.ndarray) -> None:
    """out[...] = source. bfloat16 to float32 is a shift of the bits, many times faster than a cast of numpy's."""
    if source.dtype == DTYPES["BF16"] and out.dtype == np.float32:
        np.left_shift(source.view(np.uint16), 16, out=out.view(np.uint32), dtype=np.uint32)
    else:
        out[...] = source


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of a matrix's rows, float32; reads CHUNK bytes at a time."""
    total = np.zeros(tensor.shape[1], np.float64)
    step = max(1, CHUNK // (4 * tensor.shape[1]))
    for first in range(0, tensor.shape[0], step):
        last = min(first + step, tensor.shape[0])
        rows = np.empty((last - first, tensor.shape[1]), np.float32)
        read_slice(tensor, [slice(first, last), slice(0, tensor.shape[1])], rows)
        total += rows.sum(axis=0, dtype=np.float64)
    return (total / tensor.shape[0]).astype(np.float32)
