"""Packing: every example in one row, no row too long, few rows, in no time."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.data.packing import pack
from itune.types import InputError


def naive_best_fit(lengths: list[int], max_length: int) -> list[int]:
    """Tokens in each row, by the textbook loop: longest first, into the fullest row that takes it."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row in range(len(rows)) if rows[row] + length <= max_length]
        if fitting:
            rows[max(fitting, key=lambda row: rows[row])] += length
        else:
            rows.append(length)
    return rows


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.integers(1, n), max_size=60))))
def test_is_best_fit_decreasing_and_loses_nothing(case):
    max_length, lengths = case
    rows = pack(np.asarray(lengths, np.int32), max_length)
    assert sorted(np.concatenate([*rows, np.zeros(0, int)]).tolist()) == list(range(len(lengths)))
    filled = [int(np.asarray(lengths)[row].sum()) for row in rows]
    assert sorted(filled) == sorted(naive_best_fit(lengths, max_length))


def test_rows_in_another_order_and_of_other_indices():
    rows = pack(np.asarray([3, 5, 2, 4, 1, 5]), 6)
    listed = [row.tolist() for row in rows]
    assert [row.tolist() for row in rows.ordered(np.arange(len(rows))[::-1])] == listed[::-1]
    assert [row.tolist() for row in rows.among(np.arange(10, 16))] == [[10 + i for i in row] for row in listed]
    assert [row.tolist() for row in rows[1:]] == listed[1:] and rows[-1].tolist() == listed[-1]


def test_fills_rows_of_log_normal_lengths_in_no_time():
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.8, 100_000).astype(np.int32), 1, 2048)
    start = time.process_time()
    rows = pack(lengths, 2048)
    seconds = time.process_time() - start
    assert lengths.sum() / (len(rows) * 2048) >= 0.999
    assert seconds < 0.5


def test_the_number_of_rows_does_not_depend_on_the_order():
    lengths = np.random.default_rng(1).integers(1, 100, 1000)
    counts = {len(pack(np.random.default_rng(seed).permutation(lengths), 128)) for seed in range(5)}
    assert len(counts) == 1


@pytest.mark.parametrize("lengths, found", [([3, 0, 2], "example 1 has 0"), ([3, 9, 2], "example 1 has 9")])
def test_impossible_lengths_are_named(lengths, found):
    with pytest.raises(InputError, match=f"{found} tokens; expected 1 to 8"):
        pack(np.asarray(lengths), 8)
