"""Which examples share a row: best fit decreasing, exact in the number of rows before any row is built."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np

from itune.types import InputError


class Rows(Sequence[np.ndarray]):
    """Rows of example indices in two arrays; as a list of arrays a million examples take 20 times the memory.

    `members`: the indices of all rows, one row after the other; `counts`: how many each row has.
    """

    def __init__(self, members: np.ndarray, counts: np.ndarray):
        self.members, self.counts = members, counts
        self._ends = np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.counts)

    def __getitem__(self, index: Any) -> Any:
        """The indices of one row, or a list of those of several."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = self._ends[index]
        return self.members[end - self.counts[index] : end]

    def ordered(self, order: np.ndarray) -> Rows:
        """The rows in another order."""
        counts = self.counts[order]
        return Rows(self.members[_ranges(self._ends[order] - counts, counts)], counts)

    def among(self, chosen: np.ndarray) -> Rows:
        """Rows of chosen[i] where these have i."""
        return Rows(chosen[self.members], self.counts)


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... for each start, as many as its count."""
    ends = np.cumsum(counts, dtype=np.int64)
    return np.repeat(starts - (ends - counts), counts) + np.arange(ends[-1] if len(ends) else 0)


def pack(lengths: np.ndarray, max_length: int) -> Rows:
    """Rows of example indices (int32) whose lengths sum to at most `max_length`; each index stands in one row.

    Best fit decreasing: the longest example first, each into the fullest row that still takes it. Examples of one
    length are placed together, in the given order, and the rows with r tokens left are found by one bit of an integer,
    so 100,000 examples take a fraction of a second. Raises InputError for a length below 1 or above `max_length`.
    """
    lengths = np.asarray(lengths)
    if len(lengths) == 0:
        return Rows(np.zeros(0, np.int32), np.zeros(0, np.int32))
    if lengths.min() < 1 or lengths.max() > max_length:
        worst = int(np.argmax((lengths < 1) | (lengths > max_length)))
        raise InputError(f"packing: example {worst} has {int(lengths[worst])} tokens; "
                         f"expected 1 to {max_length} (data.max_length)")
    order = np.argsort(-lengths, kind="stable").astype(np.int32)
    lengths_sorted = lengths[order]
    starts = np.flatnonzero(np.r_[True, lengths_sorted[1:] != lengths_sorted[:-1]])
    ends = np.r_[starts[1:], len(order)]
    placed = array("q"), array("q"), array("q")  # row, and the run of `order` that it takes: start, count
    rows = 0
    room_rows: list[list[int]] = [[] for _ in range(max_length + 1)]  # rows by tokens of room left
    rooms = 0  # bit r is set while some row has r tokens left
    for done, end in zip(starts.tolist(), ends.tolist()):
        length = int(lengths_sorted[done])
        while done < end:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                row = room_rows[room].pop()
                if not room_rows[room]:
                    rooms &= ~(1 << room)
            else:
                room, row = max_length, rows
                rows += 1
            count = min(room // length, end - done)
            for column, value in zip(placed, (row, done, count)):
                column.append(value)
            done += count
            left = room - count * length
            room_rows[left].append(row)
            rooms |= 1 << left
    of_row, run_starts, run_counts = (np.frombuffer(column, np.int64) for column in placed)
    by_row = np.argsort(of_row, kind="stable")
    members = order[_ranges(run_starts[by_row], run_counts[by_row])]
    return Rows(members, np.bincount(of_row, run_counts).astype(np.int32))
