"""TRL's data order: torch's permutation without torch, rows in micro-batches as its data loader cuts them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_loader import LENGTHS, seen_examples, store_of

from itune.data.loader import Loader
from itune.data.order import consecutive, torch_permutation
from itune.types import InputError


@pytest.mark.parametrize("n", [0, 1, 2, 37, 1000, 70_001])
@pytest.mark.parametrize("seed", [0, 42, 2**31, 2**40 + 7])
def test_permutation_equals_torch(n, seed):
    wanted = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).numpy()
    np.testing.assert_array_equal(torch_permutation(n, seed), wanted)


def test_a_set_that_torch_shuffles_otherwise_is_refused():
    with pytest.raises(ValueError, match="at most 214748364"):
        torch_permutation(2**32 // 20 + 1, 0)


def test_micro_batches_are_consecutive_rows():
    """Epoch e takes seed + e; its last window is short; row r of a batch belongs to micro-batch r mod accumulation."""
    loader = Loader(store_of(LENGTHS[:37]), batch_size=12, max_length=32, packing=False, seed=5, epochs=2,
                    compat="trl", accumulation=3)  # fmt: skip
    assert loader.total_steps == 8
    for epoch in range(2):
        order = torch.randperm(37, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        for window in range(4):
            batch = loader.batch(4 * epoch + window)
            found = [seen_examples(type(batch)(*(array[micro::3] for array in batch))) for micro in range(3)]
            rows = order[12 * window : 12 * window + 12]
            assert found == [rows[4 * micro : 4 * micro + 4] for micro in range(3)]
            assert [len(row) for row in loader.addresses(4 * epoch + window)].count(1) == len(rows)


def test_hosts_see_slices_of_the_same_batch():
    loader = Loader(store_of(LENGTHS[:37]), batch_size=12, max_length=32, packing=False, compat="trl", accumulation=3)
    for step in range(4):
        whole = loader.batch(step)
        halves = loader.rows(step, 0, 6), loader.rows(step, 6, 12)
        for array, first, second in zip(whole, *halves):
            np.testing.assert_array_equal(array, np.concatenate([first, second]))


def test_packed_rows_are_made_once_and_permuted():
    loader = Loader(store_of(LENGTHS), batch_size=4, max_length=64, seed=1, epochs=2, compat="trl")
    rows = [[tuple(row) for batch in range(loader.steps_per_epoch) for row in
             loader.addresses(epoch * loader.steps_per_epoch + batch) if row] for epoch in range(2)]
    assert sorted(rows[0]) == sorted(rows[1]) and rows[0] != rows[1]


def test_another_order_is_another_fingerprint_and_a_mixture_is_refused():
    store = store_of(LENGTHS)
    prints = {Loader(store, batch_size=4, max_length=32, compat=compat).fingerprint for compat in ("", "trl")}
    assert len(prints) == 2
    with pytest.raises(InputError, match=r"data\.mixture: cannot be followed with compat='trl'"):
        Loader(store, batch_size=4, max_length=32, compat="trl", mixture={"s": 1.0})


def test_consecutive_without_accumulation_changes_nothing():
    rows = [np.array([i]) for i in range(4)]
    assert [row.tolist() for row in consecutive(rows, 4, 1)] == [[0], [1], [2], [3]]
    assert [row.tolist() for row in consecutive(rows[:3], 4, 2)] == [[0], [2], [1], []]
