"""Packing 100,000 examples into rows of 1,024 tokens, with the rows built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.row import Bound, Clock, Row

EXAMPLES, LENGTH = 100_000, 1024


def lengths() -> np.ndarray:
    """Lognormal, as lengths of instruction data are: median 150, up to the row."""
    drawn = np.random.default_rng(0).lognormal(np.log(150), 0.9, EXAMPLES)
    return np.clip(drawn, 8, LENGTH).astype(np.int64)


def itune(folder: Path) -> dict[str, Any]:
    from itune.data.loader import Loader
    from itune.data.store import memory_store
    from itune.types import Address, Example

    sizes, where = lengths(), Address("s", "f", 1)
    tokens = np.arange(sizes.sum(), dtype=np.int32) % 30_000
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    store = memory_store(Example(part, np.ones(len(part), np.float32), where) for part in parts)
    clock = Clock()
    loader = Loader(store, batch_size=64, max_length=LENGTH)
    filled = sum(int(np.count_nonzero(batch.segment_ids_BL)) for _, batch in loader.iterate())
    wall, cpu = clock.read()
    rows = len(loader._plan(0))
    assert filled == sizes.sum()
    return {"seconds": wall, "cpu_seconds": cpu, "rows": rows, "fill": filled / (rows * LENGTH)}


def trl(folder: Path) -> dict[str, Any]:
    import datasets
    from trl import pack_dataset

    sizes = lengths()
    tokens = np.arange(sizes.sum(), dtype=np.int32) % 30_000
    parts = np.split(tokens, np.cumsum(sizes)[:-1])
    dataset = datasets.Dataset.from_dict({"input_ids": parts}).with_format("arrow")
    clock = Clock()
    packed = pack_dataset(dataset, LENGTH, "bfd")
    wall, cpu = clock.read()
    return {"seconds": wall, "cpu_seconds": cpu, "rows": len(packed), "fill": int(sizes.sum()) / (len(packed) * LENGTH)}


ROW = Row(
    title=f"Packing {EXAMPLES:,} examples (lognormal lengths, median 150) into rows of {LENGTH:,} tokens.",
    note="itune: the plan and every batch built, with targets, weights, segments and positions; TRL: pack_dataset, "
    "whose rows are still lists to be collated.",
    sides={"itune": itune, "trl": trl},
    repeats=11,  # medians of five swing around the bound with the machine
    bounds=(
        Bound("fill", at_least=0.999, absolute=True),
        Bound("seconds", at_most=1 / 3, busy="cpu_seconds"),
    ),
)
