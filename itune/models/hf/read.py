"""Read a planned checkpoint: positioned reads in a few threads, each byte once, into the buffers that devices take.

A leaf is read at one time: its tensors as matrices, in chunks of rows that fit a processor's cache, each converted and
cut into the shards of this process's devices. On CPU the buffers become the parameters without a copy.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from itune.models.families.stored import Part
from itune.models.hf.convert import convert, is_finite
from itune.models.hf.files import DTYPES, Tensor
from itune.models.hf.mxfp4 import MXFP4, unpack
from itune.models.hf.plan import EMBEDDING, HEAD, Plan, stack_shape
from itune.models.model import Model
from itune.types import InputError

log = logging.getLogger("itune")

CHUNK = 1 << 20  # bytes of a file that one thread reads at a time
THREADS = 4
Bounds = tuple[slice, ...]


def read_params(model: Model, plan: Plan, count: Callable[[int], None] | None = None) -> Any:
    """The parameters, placed on the model's mesh. `count` is told the bytes of every read.

    Raises InputError naming every tensor with a value that is no finite number, on all hosts where one sees it.
    """
    trees = [model.abstract_params()] + ([] if model.mesh is None else [model.shardings()])
    with Reader(count) as reader:

        def read(path: tuple, leaf: jax.ShapeDtypeStruct, sharding: Any = None) -> jax.Array:
            name = "/".join(entry.key for entry in path)
            return _read_leaf(reader, plan, name, leaf, len(stack_shape(model, name, leaf)), sharding)

        params = jax.tree_util.tree_map_with_path(read, *trees)
    broken = sorted(reader.broken)
    if _somewhere(bool(broken)):
        names = "\n  ".join(broken) or "(seen by another host)"
        raise InputError(
            f"{len(broken)} tensors hold NaN or infinity: the file is damaged, or its training diverged; "
            f"expected finite numbers:\n  {names}"
        )
    return params


def _somewhere(here: bool) -> bool:
    """Whether it is so on any host: all of them must leave together."""
    return here if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array(here)).any())


def _read_leaf(reader: Reader, plan: Plan, name: str, leaf: Any, stacked: int, sharding: Any) -> jax.Array:
    tensors, shape = plan.leaves[name], leaf.shape
    indices = [(slice(None),) * len(shape)]
    if sharding is not None:
        indices = list(sharding.addressable_devices_indices_map(shape).values())
    shards = {_key(index, shape): np.empty(0) for index in indices}
    for key in shards:
        shards[key] = empty([stop - start for start, stop in key], leaf.dtype)
    rows = tensors[0].shape[0]
    grown = shape[0] - rows if name in (EMBEDDING, HEAD) else 0
    jobs: list[Callable[[], None]] = []
    for tensor, place in zip(tensors, np.ndindex(*shape[:stacked]), strict=True):
        targets = []
        for key, buffer in shards.items():
            lead, inner = key[:stacked], key[stacked:]
            if all(start <= at < stop for at, (start, stop) in zip(place, lead, strict=True)):
                at = tuple(p - start for p, (start, _) in zip(place, lead, strict=True))
                targets.append(Target(tuple(slice(*pair) for pair in inner), buffer[at]))
        for matrix in matrices(tensor, plan.parts[name], targets, rows if grown else None):
            jobs += reader.jobs(matrix)
    reader.run(jobs)
    if grown:
        log.info("%s: %d rows added to the %d of the checkpoint, each the mean of those", name, grown, rows)
        mean = mean_row(tensors[0])
        for ((start, stop), (left, right)), buffer in shards.items():
            buffer[max(0, rows - start) : max(0, stop - start)] = mean[left:right]
    if sharding is None:
        return jax.device_put(next(iter(shards.values())))
    return jax.make_array_from_callback(shape, sharding, lambda index: shards[_key(index or (), shape)])


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def empty(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """np.empty at an address that jax takes over on CPU without a copy."""
    shape, dtype = tuple(shape), np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


class Target(NamedTuple):
    """A piece of a tensor, in the parameter's coordinates, and the array that it goes to."""

    bounds: Bounds
    out: np.ndarray


class Matrix(NamedTuple):
    """Rows of a tensor as they lie in its file, and where pieces of them go: (rows, columns, array of their shape)."""

    tensor: Tensor
    first: int  # bytes before the matrix
    shape: tuple[int, int]
    pieces: list[tuple[slice, slice, np.ndarray]]


def matrices(tensor: Tensor, part: Part, targets: list[Target], rows: int | None = None) -> list[Matrix]:
    """The matrices of a tensor, one for each entry of the axes before its last two.

    `rows`: the tensor has as many, fewer than the parameter; what targets want beyond them is not read.
    """
    lead, inner = tensor.shape[:-2], tensor.shape[-2:]
    packed = tensor.dtype == MXFP4
    shape = (1, *inner) if len(inner) == 1 else (inner[1], inner[0]) if packed else inner
    size = (tensor.stop - tensor.start) // int(np.prod(lead, dtype=np.int64))
    swapped = part.transposed != packed
    found = []
    for number, place in enumerate(np.ndindex(*lead)):
        pieces = []
        for bounds, out in targets:
            if not all(b.start <= at < b.stop for at, b in zip(place, bounds, strict=False)):
                continue
            out = out[tuple(at - b.start for at, b in zip(place, bounds, strict=False))]
            across = bounds[len(lead) :]
            if len(across) == 1:
                across, out = (slice(0, 1), *across), out[None]
            if rows is not None:
                across = (slice(across[0].start, max(across[0].start, min(across[0].stop, rows))), across[1])
                out = out[: across[0].stop - across[0].start]
            # a packed tensor has the interleaved axis, the parameter's `out`, in its rows, any other in its columns
            wide = across[0] if part.transposed else across[1]
            apart = slice(part.first + wide.start * part.step, part.first + (wide.stop - 1) * part.step + 1, part.step)
            along = across[1] if part.transposed else across[0]
            ordered = (apart, along) if part.transposed and packed else (along, apart)
            if out.size:
                pieces.append((*ordered, out.T if swapped else out))
        if pieces:
            found.append(Matrix(tensor, number * size, (int(shape[0]), int(shape[1])), pieces))
    return found


class Reader:
    """Threads, open files, and what was found on the way. A context manager."""

    def __init__(self, count: Callable[[int], None] | None = None):
        self.count, self.broken, self.files = count, set[str](), dict[Path, int]()
        self.pool, self.lock, self.own = ThreadPoolExecutor(THREADS), threading.Lock(), threading.local()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: Any) -> None:
        self.pool.shutdown()
        for handle in self.files.values():
            os.close(handle)

    def run(self, jobs: list[Callable[[], None]]) -> None:
        list(self.pool.map(lambda job: job(), jobs))

    def jobs(self, matrix: Matrix) -> Iterable[Callable[[], None]]:
        """A job for each chunk of rows that a piece wants."""
        width = matrix.shape[1] * (4 if matrix.tensor.dtype == MXFP4 else DTYPES[matrix.tensor.dtype].itemsize)
        step = max(1, CHUNK // width)
        low = min(rows.start for rows, *_ in matrix.pieces)
        high = max(rows.stop for rows, *_ in matrix.pieces)
        for first in range(low, high, step):
            last = min(first + step, high)
            live = [piece for piece in (_cut(p, first, last) for p in matrix.pieces) if piece[2].size]
            if live:
                yield lambda live=live, first=first, last=last: self._chunk(matrix, first, last, live)  # type: ignore[misc]

    def _chunk(self, matrix: Matrix, first: int, last: int, pieces: list[tuple[slice, slice, np.ndarray]]) -> None:
        packed = matrix.tensor.dtype == MXFP4
        for span in [slice(0, matrix.shape[1])] if packed else _spans(pieces):
            block = self._packed(matrix, first, last) if packed else self._plain(matrix, first, last, span, pieces)
            finite = is_finite(block)
            if not finite:
                self.broken.add(matrix.tensor.name)
            for rows, columns, out in pieces:
                if span.start <= columns.start and columns.stop <= span.stop:
                    cut = slice(columns.start - span.start, columns.stop - span.start, columns.step)
                    piece = block[rows.start - first : rows.stop - first : rows.step, cut]
                    if piece.ctypes.data != out.ctypes.data:  # else it was read in place
                        convert(piece, out, finite)

    def _plain(self, matrix: Matrix, first: int, last: int, span: slice, pieces: list) -> np.ndarray:
        """Rows first .. last of the columns of `span`; read in place where one piece is just that."""
        dtype = DTYPES[matrix.tensor.dtype]
        width = span.stop - span.start
        shape = (last - first, width)
        _, _, out = pieces[0]
        straight = len(pieces) == 1 and out.shape == shape and out.dtype == dtype and out.flags.c_contiguous
        block = out if straight else self._scratch(int(np.prod(shape)) * dtype.itemsize).view(dtype).reshape(shape)
        start = matrix.tensor.start + matrix.first
        line = matrix.shape[1] * dtype.itemsize
        if width == matrix.shape[1]:
            self._read(matrix.tensor.file, start + first * line, block)
        else:
            for row in range(first, last):
                at = start + row * line + span.start * dtype.itemsize
                self._read(matrix.tensor.file, at, block[row - first])
        return block

    def _packed(self, matrix: Matrix, first: int, last: int) -> np.ndarray:
        """Rows first .. last, unpacked, float32."""
        tensor, groups = matrix.tensor, matrix.shape[1] // 32
        assert tensor.scales is not None
        blocks, scales = np.empty((last - first, groups * 16), np.uint8), np.empty((last - first, groups), np.uint8)
        self._read(tensor.file, tensor.start + matrix.first + first * groups * 16, blocks)
        self._read(tensor.scales.file, tensor.scales.start + matrix.first // 16 + first * groups, scales)
        return unpack(blocks, scales)

    def _scratch(self, size: int) -> np.ndarray:
        """Memory of this thread, used again by its next chunk."""
        if getattr(self.own, "memory", np.empty(0)).size < size:
            self.own.memory = np.empty(size, np.uint8)
        return self.own.memory[:size]

    def _read(self, file: Path, start: int, out: np.ndarray) -> None:
        with self.lock:
            if file not in self.files:
                self.files[file] = os.open(file, os.O_RDONLY)
            handle = self.files[file]
        view, done = memoryview(out.reshape(-1).view(np.uint8).data), 0
        while done < len(view):
            got = os.preadv(handle, [view[done:]], start + done)
            if not got:
                raise InputError(f"{file}: ends at byte {start + done}, it was longer before; copy it again")
            done += got
        if self.count is not None:
            self.count(done)


def _cut(piece: tuple[slice, slice, np.ndarray], first: int, last: int) -> tuple[slice, slice, np.ndarray]:
    """What a piece wants of the rows first .. last."""
    rows, columns, out = piece
    step = rows.step or 1
    begin = max(0, -(-(first - rows.start) // step))
    end = min(len(out), -(-(last - rows.start) // step))
    start = rows.start + begin * step
    return slice(start, max(start, rows.start + (end - 1) * step + 1), step), columns, out[begin:max(begin, end)]


def _spans(pieces: list[tuple[slice, slice, np.ndarray]]) -> list[slice]:
    """The columns that the pieces want, joined where they touch."""
    spans: list[slice] = []
    for columns in sorted({(columns.start, columns.stop) for _, columns, _ in pieces}):
        if spans and columns[0] <= spans[-1].stop:
            spans[-1] = slice(spans[-1].start, max(spans[-1].stop, columns[1]))
        else:
            spans.append(slice(*columns))
    return spans


def read_slice(tensor: Tensor, bounds: Iterable[slice], out: np.ndarray) -> None:
    """out[...] = tensor[bounds], converted to its dtype. Raises InputError for NaN and infinity."""
    with Reader() as reader:
        for matrix in matrices(tensor, Part(tensor.name), [Target(tuple(bounds), out)]):
            reader.run(list(reader.jobs(matrix)))
    if reader.broken:
        raise InputError(f"{tensor.file}: {tensor.name} holds NaN or infinity; expected finite numbers")


def mean_row(tensor: Tensor) -> np.ndarray:
    """The mean of a matrix's rows, float32; reads a chunk at a time."""
    total = np.zeros(tensor.shape[1], np.float64)
    row = tensor.shape[1] * DTYPES[tensor.dtype].itemsize
    for first in range(0, tensor.shape[0], max(1, CHUNK // row)):
        size = min(CHUNK // row or 1, tensor.shape[0] - first) * tensor.shape[1]
        rows = np.fromfile(tensor.file, DTYPES[tensor.dtype], size, offset=tensor.start + first * row)
        total += rows.reshape(-1, tensor.shape[1]).sum(axis=0, dtype=np.float64)
    return (total / tensor.shape[0]).astype(np.float32)
