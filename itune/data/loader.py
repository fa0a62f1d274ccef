"""Step -> Batch, a pure function of (fingerprint, seed, step); its rows for one host; prefetched in the background."""

from __future__ import annotations

import bisect
import functools
import hashlib
import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from itune.data.mixture import Mixture, draws, realised
from itune.data.order import consecutive, torch_permutation
from itune.data.packing import Rows, pack
from itune.data.store import ExampleStore
from itune.types import Batch, InputError


class Loader:
    """Batches of an ExampleStore for training.

    batch_size: rows of the global batch. max_length: tokens a row. packing: several examples a row. seed: decides the
    order of every epoch. epochs: passes over the data, 1.5 is one and a half. max_steps: where above 0, the number of
    steps instead. mixture: a Mixture, or source name -> weight; None or {} takes each example once an epoch. compat:
    "trl" gives TRL's order: rows in the order of the files (packed once, not anew in every epoch), permuted for epoch e
    as torch does with seed + e, and micro-batches of consecutive rows, for which `accumulation` is needed. Raises
    InputError for an empty store, an example longer than max_length, or a mixture that does not fit sources or compat.
    """

    def __init__(self, store: ExampleStore, *, batch_size: int, max_length: int, packing: bool = True, seed: int = 0,
                 epochs: float = 1.0, max_steps: int = 0, mixture: Mixture | Mapping[str, float] | None = None,
                 compat: str = "", accumulation: int = 1):  # fmt: skip
        if len(store) == 0:
            raise InputError("data.train: no example is left to train on; see the drops in the data report")
        self.store, self.batch_size, self.max_length = store, batch_size, max_length
        self.packing, self.seed, self.mixture = packing, seed, Mixture.of(mixture)
        self.compat, self.accumulation = compat, accumulation
        if compat and self.mixture:
            raise InputError(f"data.mixture: cannot be followed with compat={compat!r}, which takes each row once an "
                             "epoch; leave one of them out")
        self._step_ends: list[int] = []
        self.steps_per_epoch = self._epoch_steps(0)
        self.total_steps = max_steps or self._steps_of(epochs)

    @property
    def efficiency(self) -> float:
        """Share of the first epoch's token positions that hold a token."""
        tokens = int(self.store.lengths[self._plan(0).members].sum())
        return tokens / (self.steps_per_epoch * self.batch_size * self.max_length)

    @property
    def fingerprint(self) -> str:
        """Hash of all that decides the content of batch `step`; how many steps are taken is not part of it."""
        parts = [self.store.fingerprint, self.batch_size, self.max_length, self.packing, self.seed]
        weights, keys = sorted(self.mixture.mixture.items()), self.mixture.set_keys()
        if self.mixture.balance:
            keys.append(("categories", hashlib.sha256(self.store.categories.tobytes()).hexdigest()))
        parts += [self.compat] if self.compat else []
        return hashlib.sha256(json.dumps([*parts, weights, *keys]).encode()).hexdigest()

    def realised(self) -> dict[str, Any]:
        """The first epoch by source and category: draws, repeats, shares in examples and in supervised tokens."""
        chosen = self._plan(0).members
        return realised(self.store, chosen) | {"epochs": self.epoch(self.total_steps - 1)}

    @property
    def max_segments(self) -> int:
        """Examples in the fullest row of the run, the padding after them counted as one."""
        epochs = self._locate(self.total_steps - 1)[0] + 1 if self.mixture else 1
        return max(int(self._plan(epoch).counts.max()) for epoch in range(epochs)) + 1

    def batch(self, step: int) -> Batch:
        """The global batch of `step`, counted from 0: int32 and float32 arrays of shape (batch_size, max_length)."""
        return self.rows(step, 0, self.batch_size)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of the global batch of `step`, for one host."""
        return build_batch(self.store, self._members(step)[start:stop], stop - start, self.max_length)

    def addresses(self, step: int) -> list[list[str]]:
        """For each row of the global batch, the addresses of its examples in order."""
        found = [[str(self.store.address(i)) for i in row.tolist()] for row in self._members(step)]
        return found + [[] for _ in range(self.batch_size - len(found))]

    def epoch(self, step: int) -> float:
        """Passes over the data that are done before `step`."""
        number, inside = self._locate(step)
        return number + inside / self._epoch_steps(number)

    def iterate(self, start_step: int = 0, rows: tuple[int, int] | None = None,
                ahead: int = 4) -> Iterator[tuple[int, Batch]]:  # fmt: skip
        """(step, batch) from `start_step` to the last, built `ahead` steps early by one thread; `rows` is a host's."""
        start, stop = rows or (0, self.batch_size)
        steps = range(start_step, self.total_steps)
        return prefetched(((step, self.rows(step, start, stop)) for step in steps), ahead)

    def _members(self, step: int) -> list[np.ndarray]:
        epoch, inside = self._locate(step)
        rows = self._plan(epoch)[inside * self.batch_size : (inside + 1) * self.batch_size]
        return consecutive(rows, self.batch_size, self.accumulation) if self.compat else rows

    def _locate(self, step: int) -> tuple[int, int]:
        """(epoch, step within it)."""
        if step < 0:
            raise IndexError(f"step {step}; steps are counted from 0")
        if not self.mixture:
            return divmod(step, self.steps_per_epoch)
        while not self._step_ends or self._step_ends[-1] <= step:
            last = self._step_ends[-1] if self._step_ends else 0
            self._step_ends.append(last + self._epoch_steps(len(self._step_ends)))
        epoch = bisect.bisect_right(self._step_ends, step)
        return epoch, step - (self._step_ends[epoch - 1] if epoch else 0)

    def _epoch_steps(self, epoch: int) -> int:
        return math.ceil(len(self._plan(epoch if self.mixture else 0)) / self.batch_size)

    def _steps_of(self, epochs: float) -> int:
        whole = math.floor(epochs)
        if not self.mixture:
            return max(1, math.ceil(epochs * self.steps_per_epoch - 1e-9))
        part = math.ceil((epochs - whole) * self._epoch_steps(whole) - 1e-9) if epochs > whole else 0
        return max(1, sum(self._epoch_steps(epoch) for epoch in range(whole)) + part)

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a loader lives as long as its run)
    def _plan(self, epoch: int) -> Rows:
        """Rows of example indices of one epoch, in training order."""
        if self.compat:
            rows = self._rows_of(np.arange(len(self.store)))
            return rows.ordered(torch_permutation(len(rows), self.seed + epoch))
        rng = np.random.default_rng([self.seed, epoch])
        chosen = draws(self.store, self.mixture, (self.seed, epoch))
        rows = self._rows_of(chosen[rng.permutation(len(chosen))])
        return rows.ordered(rng.permutation(len(rows)))

    def _rows_of(self, chosen: np.ndarray) -> Rows:
        """Examples in rows: several a row, or one."""
        if self.packing:
            return pack(self.store.lengths[chosen], self.max_length).among(chosen)
        longest = int(self.store.lengths[chosen].max())
        if longest > self.max_length:
            raise InputError(f"an example has {longest} tokens; expected at most data.max_length={self.max_length}")
        return Rows(chosen, np.ones(len(chosen), np.int32))


def make_loader(config: Any, store: ExampleStore) -> Loader:
    """The loader of a run's config."""
    data, train = config.data, config.train
    return Loader(store, batch_size=train.batch_size, max_length=data.max_length, packing=data.packing,
                  seed=config.seed, epochs=train.epochs, max_steps=train.max_steps, mixture=Mixture.of(data),
                  compat=config.compat, accumulation=train.accumulation)  # fmt: skip


def fullest(rows: Sequence[np.ndarray]) -> int:
    """Runs of equal segment id in the fullest row: its examples, and padding."""
    return max((len(row) for row in rows), default=0) + 1


def build_batch(store: ExampleStore, members: Sequence[np.ndarray], rows: int, max_length: int) -> Batch:
    """`rows` rows of `max_length` positions; row b holds the examples `members[b]`, rows beyond have weight 0.

    The shift happens here: targets_BL is the next token of the same segment; a segment's last token has weight 0.
    """
    counts = np.zeros(rows, np.int64)
    counts[: len(members)] = [len(row) for row in members]
    index = np.concatenate([np.zeros(0, np.int64), *members])
    row_of, row_ends = np.repeat(np.arange(rows), counts), np.cumsum(counts)
    lengths = store.lengths[index].astype(np.int64)
    padding = max_length - np.bincount(row_of, lengths, rows).astype(np.int64)
    number = np.arange(len(index)) - (row_ends - counts)[row_of] + 1  # of an example in its row
    # the padding of a row follows its examples as one of number 0
    begins, sizes, numbers = (np.insert(*column) for column in (
        (store.offsets[index], row_ends, 0), (lengths, row_ends, padding), (number, row_ends, 0)))  # fmt: skip
    return Batch(*(values.reshape(rows, max_length) for values in _flat(store, begins, sizes, numbers)))


def _flat(store: ExampleStore, begins: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> Batch:
    """The arrays of a batch, row after row. `begins`, `sizes`: where the examples are in the store; 0 in `numbers` is
    padding.
    """
    all_tokens, all_weights = np.asarray(store.tokens), np.asarray(store.weights)  # slices of a memory map are slow
    none = np.zeros(int(sizes.max()), np.int32)
    spans = list(zip(begins.tolist(), (begins + sizes).tolist(), numbers.tolist()))
    tokens = np.concatenate([(all_tokens if real else none)[a:b] for a, b, real in spans], dtype=np.int32)
    weights = np.concatenate([(all_weights if real else none)[a:b] for a, b, real in spans], dtype=np.float32)
    ends = np.cumsum(sizes)
    targets, shifted = np.empty_like(tokens), np.empty_like(weights)
    targets[:-1], shifted[:-1] = tokens[1:], weights[1:]
    targets[ends - 1] = shifted[ends - 1] = 0
    segments = np.repeat(numbers.astype(np.int32), sizes)
    positions = np.arange(ends[-1], dtype=np.int32)
    positions -= np.repeat((ends - sizes).astype(np.int32), sizes)
    positions[segments == 0] = 0
    return Batch(tokens, targets, shifted, segments, positions)


class EvalBatches(Sequence[Batch]):
    """Batches that hold each example of a store once, in a fixed order; built when they are asked for."""

    def __init__(self, store: ExampleStore, batch_size: int, max_length: int, packing: bool = True):
        self.store, self.batch_size, self.max_length = store, batch_size, max_length
        rows = pack(store.lengths, max_length) if packing else [np.asarray([i]) for i in range(len(store))]
        self._rows = sorted((np.sort(row) for row in rows), key=lambda row: int(row[0]))

    @property
    def max_segments(self) -> int:
        """Examples in the fullest row, the padding after them counted as one."""
        return fullest(self._rows)

    def __len__(self) -> int:
        return math.ceil(len(self._rows) / self.batch_size)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        return build_batch(self.store, self._members(number), self.batch_size, self.max_length)

    def example_index_BL(self, number: int) -> np.ndarray:
        """int32: the example that each position of batch `number` belongs to, -1 where there is none."""
        index_BL = np.full((self.batch_size, self.max_length), -1, np.int32)
        for b, row in enumerate(self._members(number)):
            filled = np.repeat(row, self.store.lengths[row])
            index_BL[b, : len(filled)] = filled
        return index_BL

    def _members(self, number: int) -> list[np.ndarray]:
        if not -len(self) <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        number %= len(self)
        return self._rows[number * self.batch_size : (number + 1) * self.batch_size]


def eval_batches(store: ExampleStore, batch_size: int, max_length: int, packing: bool = True) -> EvalBatches:
    """Batches for evaluation, the last filled with rows of weight 0. Raises InputError for too long an example."""
    return EvalBatches(store, batch_size, max_length, packing)


def prefetched(items: Iterator, ahead: int) -> Iterator:
    """`items`, computed up to `ahead` early in a daemon thread; its exception is raised where the item is due."""
    results: queue.Queue = queue.Queue(maxsize=max(1, ahead))
    stopped = threading.Event()
    done = object()

    def put(entry: tuple) -> bool:
        while not stopped.is_set():
            try:
                results.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((done, None))
        except BaseException as error:  # whatever it is belongs to the consumer
            put((done, error))

    def consume() -> Iterator:
        thread = threading.Thread(target=work, name="itune-prefetch", daemon=True)
        thread.start()
        try:
            while True:
                item, error = results.get()
                if error is not None:
                    raise error
                if item is done:
                    return
                yield item
        finally:
            stopped.set()

    return consume()
