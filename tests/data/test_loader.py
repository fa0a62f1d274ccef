"""The loader: batch t is a function of store, seed and t; each example once an epoch; hosts see slices of one batch."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from itune.data.loader import Loader, build_batch, eval_batches, prefetched
from itune.data.mixture import Mixture, planned_counts
from itune.data.store import memory_store
from itune.types import Address, Batch, Example, InputError


def store_of(lengths, sources=None):
    """Example i has the tokens 1000 * i, 1000 * i + 1, ..., and weight 1 but for its first half."""
    examples = []
    for i, n in enumerate(lengths):
        weights = (np.arange(n) >= n // 2).astype(np.float32)
        address = Address(sources[i] if sources else "s", "f.jsonl", i + 1)
        examples.append(Example(1000 * i + np.arange(n, dtype=np.int32), weights, address))
    return memory_store(examples)


LENGTHS = np.random.default_rng(0).integers(2, 30, 97).tolist()


def equal(one: Batch, two: Batch) -> bool:
    return all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(one, two))


def make(store=None, **options):
    settings = {"batch_size": 4, "max_length": 32, "seed": 3} | options
    return Loader(store_of(LENGTHS) if store is None else store, **settings)


def seen_examples(batch: Batch) -> list[int]:
    starts = (batch.segment_ids_BL > 0) & (batch.positions_BL == 0)
    return (batch.tokens_BL[starts] // 1000).tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_is_each_example_once_and_the_last_batch_is_filled(packing):
    loader = make(packing=packing, epochs=2)
    for epoch in range(2):
        batches = [loader.batch(epoch * loader.steps_per_epoch + i) for i in range(loader.steps_per_epoch)]
        assert sorted(i for batch in batches for i in seen_examples(batch)) == list(range(97))
        assert {batch.tokens_BL.shape for batch in batches} == {(4, 32)}
    filled = batches[-1].segment_ids_BL.any(1).tolist()
    assert filled == sorted(filled, reverse=True)
    empty = batches[-1].segment_ids_BL == 0
    assert not batches[-1].loss_weights_BL[empty].any()
    assert loader.total_steps == 2 * loader.steps_per_epoch
    if not packing:
        assert loader.steps_per_epoch == -(-97 // 4)


def test_batches_are_pure_and_differ_by_seed_and_epoch():
    one, two, other = make(epochs=3), make(epochs=1), make(seed=4)
    for step in (5, 0, one.total_steps - 1):
        assert equal(one.batch(step), two.batch(step))
    assert not equal(one.batch(0), other.batch(0))
    assert not equal(one.batch(0), one.batch(one.steps_per_epoch))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_the_fingerprint_covers_all_that_decides_a_batch():
    base = make().fingerprint
    changed = [
        make(store_of([*LENGTHS, 3])), make(seed=9), make(batch_size=8), make(max_length=64), make(packing=False),
        make(mixture={"s": 1.0}),
    ]  # fmt: skip
    assert base not in {loader.fingerprint for loader in changed}
    assert make(epochs=9).fingerprint == make(max_steps=2).fingerprint == base


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_hosts_load_slices_of_the_global_batch(hosts):
    loader = make()
    size = 4 // hosts
    for step in range(loader.steps_per_epoch):
        parts = [loader.rows(step, host * size, (host + 1) * size) for host in range(hosts)]
        assert equal(Batch(*(np.concatenate(fields) for fields in zip(*parts))), loader.batch(step))
    assert [len(row) for row in loader.addresses(0)] == loader.batch(0).segment_ids_BL.max(1).tolist()


@pytest.mark.parametrize("start", [0, 1, 7, 24, 25])
def test_iteration_resumes_at_any_step(start):
    loader = make(epochs=2)
    found = list(loader.iterate(start))
    assert [step for step, _ in found] == list(range(start, loader.total_steps))
    assert all(equal(batch, loader.batch(step)) for step, batch in found)
    halves = list(loader.iterate(start, rows=(2, 4)))
    assert equal(halves[0][1], loader.rows(start, 2, 4))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 16), min_size=1, max_size=40), st.integers(1, 5), st.booleans(), st.integers(0, 99))
def test_targets_weights_segments_and_positions(lengths, batch_size, packing, seed):
    store = store_of(lengths)
    loader = Loader(store, batch_size=batch_size, max_length=16, packing=packing, seed=seed)
    weight = 0.0
    for step in range(loader.steps_per_epoch):
        batch = loader.batch(step)
        weight += batch.loss_weights_BL.sum()
        for b in range(batch_size):
            segments = batch.segment_ids_BL[b]
            assert set(segments.tolist()) - {0} == set(range(1, segments.max() + 1))
            assert (np.diff((segments == 0).astype(int)) >= 0).all()  # padding only at the end
            for segment in range(1, segments.max() + 1):
                at = np.flatnonzero(segments == segment)
                tokens = batch.tokens_BL[b, at]
                example = store[int(tokens[0]) // 1000]
                assert np.array_equal(tokens, example.token_ids)
                assert np.array_equal(batch.positions_BL[b, at], np.arange(len(at)))
                assert np.array_equal(batch.targets_BL[b, at[:-1]], tokens[1:])
                assert np.array_equal(batch.loss_weights_BL[b, at[:-1]], example.loss_weights[1:])
                assert batch.loss_weights_BL[b, at[-1]] == 0
    assert weight == sum(float(store[i].loss_weights[1:].sum()) for i in range(len(lengths)))


def test_steps_of_fractions_of_an_epoch_and_of_max_steps():
    steps = make().steps_per_epoch
    assert make(epochs=0.5).total_steps == -(-steps // 2)
    assert make(epochs=1.5).total_steps == -(-3 * steps // 2)
    assert make(max_steps=3).total_steps == 3 and make(max_steps=10 * steps).total_steps == 10 * steps
    assert make(epochs=2).epoch(steps + 1) == 1 + 1 / steps
    assert 0.9 < make().efficiency <= 1.0
    assert make(packing=False).efficiency == pytest.approx(sum(LENGTHS) / (25 * 4 * 32))


def test_impossible_input_is_refused():
    with pytest.raises(InputError, match="no example is left"):
        make(store_of([]))
    for packing in (True, False):
        with pytest.raises(InputError, match=r"data\.max_length"):
            make(max_length=8, packing=packing)
    with pytest.raises(IndexError):
        make().batch(-1)


def test_mixture_plans_each_epoch_and_draws_each_plan_once():
    names = ["a"] * 40 + ["b"] * 57
    loader = make(store_of(LENGTHS, names), mixture={"a": 3, "b": 1}, epochs=3)
    epochs, step = [], 0
    while step < loader.total_steps:
        count = loader._epoch_steps(len(epochs))
        epochs.append([i for number in range(count) for i in seen_examples(loader.batch(step + number))])
        step += count
    assert step == loader.total_steps and len(epochs) == 3
    for seen in epochs:
        counts = np.bincount(seen, minlength=97)
        assert counts[:40].sum() == 73 and counts[40:].sum() == 24  # 97 draws as 3 : 1
        assert counts[:40].max() - counts[:40].min() <= 1 and counts[40:].max() <= 1
    assert sorted(epochs[0]) != sorted(epochs[1])
    resumed = make(store_of(LENGTHS, names), mixture={"a": 3, "b": 1}, epochs=3)
    assert equal(resumed.batch(loader.total_steps - 1), loader.batch(loader.total_steps - 1))


@pytest.mark.parametrize("weights, message", [
    ({"a": 1, "c": 1}, r"no source is called c; sources with examples: a, b"), ({"a": 1}, "no weight for b"),
    ({"a": -1, "b": 1}, r"data\.mixture\.a: found -1"), ({"a": 0, "b": 0}, "every weight is 0"),
    ({"a": "x", "b": 1}, r"data\.mixture\.a: found 'x'"),
])  # fmt: skip
def test_mixture_faults(weights, message):
    with pytest.raises(InputError, match=message):
        planned_counts({"a": 3, "b": 5}, weights)
    assert planned_counts({"a": 3, "b": 5}, {"a": 0, "b": 1}) == {"a": 0, "b": 5}


@pytest.mark.parametrize("mixture", [{}, {"a": 1.0, "b": 3.0}])
def test_the_most_segments_of_a_row_are_known_before_the_first_step(mixture):
    sources = ["a" if i % 2 else "b" for i in range(97)]
    loader = make(store_of(LENGTHS, sources), epochs=3, mixture=mixture)
    rows = [row for step in range(loader.total_steps) for row in loader.batch(step).segment_ids_BL]
    runs = [1 + int((np.diff(row) != 0).sum()) for row in rows]
    assert max(runs) <= loader.max_segments <= max(runs) + 1
    held_out = eval_batches(loader.store, 4, 32)
    most = max(int(batch.segment_ids_BL.max()) for batch in held_out[:])
    assert held_out.max_segments == most + 1


def test_prefetching_hands_on_errors_and_stops_with_its_consumer():
    def items():
        yield 1
        raise ValueError("broken")

    stream = prefetched(items(), 2)
    assert next(stream) == 1
    with pytest.raises(ValueError, match="broken"):
        next(stream)
    made = []
    endless = prefetched((made.append(i) or i for i in range(10**9)), 3)
    assert [next(endless) for _ in range(5)] == list(range(5))
    endless.close()
    assert len(made) < 20


@pytest.mark.parametrize("packing", [True, False])
def test_evaluation_batches_hold_each_example_once_and_tell_which(packing):
    store = store_of(LENGTHS)
    batches = eval_batches(store, 4, 32, packing)
    found = []
    for number, batch in enumerate(batches):
        found += seen_examples(batch)
        index_BL = batches.example_index_BL(number)
        filled = batch.segment_ids_BL > 0
        assert np.array_equal(index_BL[filled], batch.tokens_BL[filled] // 1000)
        assert (index_BL[~filled] == -1).all() and batch.tokens_BL.shape == (4, 32)
    assert sorted(found) == list(range(97))
    assert equal(batches[-1], batches[len(batches) - 1]) and len(batches[:2]) == 2
    assert not build_batch(store, [], 2, 8).segment_ids_BL.any()
    assert len(eval_batches(store_of([]), 4, 32)) == 0


def test_counts_caps_temperature_and_balance_plan_an_epoch():
    """Hand-computed draws; the fingerprint changes with each key; a plan of the first epoch is what is realised."""
    sources = ["a"] * 60 + ["b"] * 37

    def drawn(**keys):
        loader = make(store_of(LENGTHS, sources), mixture=Mixture(**keys))
        seen = [i for step in range(loader.steps_per_epoch) for i in seen_examples(loader.batch(step))]
        counts = np.bincount(seen, minlength=97)
        assert loader.realised()["by_source"]["groups"]["a"]["draws"] == counts[:60].sum()
        prints.add(loader.fingerprint)
        return int(counts[:60].sum()), int(counts[60:].sum())

    prints = {make(store_of(LENGTHS, sources)).fingerprint}
    assert drawn(counts={"a": 10}) == (10, 37)
    assert drawn(counts={"a": 0.5, "b": 2.0}) == (30, 74)
    assert drawn(cap=20) == (20, 20)
    assert drawn(temperature=1e9, draws=50) == (25, 25)
    assert drawn(mixture={"a": 1, "b": 3}, draws=40) == (10, 30)
    assert drawn(mixture={"a": 1, "b": 9}, draws=50, max_repeats=1.0) == (13, 37)
    assert len(prints) == 7
    with pytest.raises(InputError, match=r"data\.counts: no source is called c"):
        drawn(counts={"c": 3})


def test_balance_by_category():
    store = store_of(LENGTHS, ["a"] * 60 + ["b"] * 37)
    store.categories = np.asarray([0] * 30 + [3] * 67, np.int8)  # creative, coding
    loader = make(store, mixture=Mixture(balance={"creative": 0.25, "coding": 0.75}, draws=80))
    shares = loader.realised()["by_category"]["groups"]
    assert (shares["creative"]["draws"], shares["coding"]["draws"]) == (20, 60)
    assert make(store, mixture=Mixture(balance={"coding": 1.0})).realised()["by_category"]["draws"] == 67
    for keys, message in (({"balance": {"codin": 1.0}}, r"no category is called codin \(nearest: coding\)"),
                          ({"balance": {"safety": 1.0}}, "no rows for safety"),
                          ({"balance": {"coding": 1.0}, "cap": 3}, r"cannot stand beside data\.cap")):  # fmt: skip
        with pytest.raises(InputError, match=message):
            make(store, mixture=Mixture(**keys))
