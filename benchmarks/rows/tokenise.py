"""Chat template, mask and tokenisation: tokens a CPU-second, ids and masks identical."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.row import Bound, Clock, Row

ROWS = 8000


def prepare(folder: Path) -> None:
    inputs.make_model(folder / "model", "2m")
    inputs.make_tokenizer(folder / "model", 8192)
    inputs.write_rows(folder / "rows.jsonl", inputs.rows(ROWS))


def measured(clock: Clock, tokens: int, digest: Any) -> dict[str, Any]:
    wall, cpu = clock.read()
    return {"tokens": tokens, "seconds": wall, "cpu_seconds": cpu, "tokens_per_cpu_second": tokens / cpu,
            "tokens_per_second": tokens / wall, "digest": digest}  # fmt: skip


def itune(folder: Path) -> dict[str, Any]:
    import shutil

    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the command does (itune/cli.py)

    import itune.data.build  # noqa: F401 (imported where data are prepared; the peer's imports are before the clock, too)
    from benchmarks import ours
    from itune.data.dataset import prepare as prepare_dataset
    from itune.data.templates import load_tokenizer

    shutil.rmtree(folder / "cache" / "itune-data", ignore_errors=True)
    data = {"train": str(folder / "rows.jsonl"), "max_length": 1_000_000, "quality": ours.without_filters()}
    config = ours.config_of(folder, data=data)
    tokenizer = load_tokenizer(config.model.path)  # the peer's trainer has loaded its own before the clock, too
    clock = Clock()
    store = prepare_dataset(config.data, tokenizer, seed=0, log=lambda _: None).train
    result = measured(clock, len(store.tokens), "")
    return result | {"digest": digest_of(store.tokens, store.weights > 0)}


def trl(folder: Path) -> dict[str, Any]:
    import shutil

    import datasets
    import numpy as np

    from benchmarks import peer

    shutil.rmtree(folder / "cache" / "hf", ignore_errors=True)
    few = datasets.Dataset.from_list(inputs.read_rows(folder / "rows.jsonl")[:2])
    made = peer.trainer(folder, few, max_length=None)
    clock = Clock()
    dataset = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
    done = made._prepare_dataset(dataset, made.processing_class, made.args, False, None, "train")
    result = measured(clock, 0, "")
    ids, labels = (np.concatenate(done.with_format("numpy")[name][:]) for name in ("input_ids", "labels"))
    cpu, wall = result["cpu_seconds"], result["seconds"]
    return result | {"tokens": len(ids), "tokens_per_cpu_second": len(ids) / cpu, "tokens_per_second": len(ids) / wall,
                     "digest": digest_of(ids, labels != -100)}  # fmt: skip


def digest_of(ids: Any, on: Any) -> list[str]:
    """Hashes of ids and of the mask."""
    return [hashlib.sha256(array.astype(kind).tobytes()).hexdigest() for array, kind in ((ids, "int32"), (on, "bool"))]


ROW = Row(
    title=f"Preparing {ROWS:,} conversations of P3 and GSM8K: template, mask, tokens, written where training reads.",
    note="Ids and masks of both sides hash to the same. itune's time holds the proof of each mask by decoding. "
    "Filters are off: TRL has none. tokenizers runs in one thread on our side, as under `itune train`; with its own "
    "threads a batch is ready sooner and takes more CPU-seconds (2.12 of TRL's tokens a CPU-second then).",
    sides={"itune": itune, "trl": trl},
    prepare=prepare,
    equal=(("digest", 0.0),),
    bounds=(Bound("tokens_per_cpu_second", at_least=2.0),),
)
