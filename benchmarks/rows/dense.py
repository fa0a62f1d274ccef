"""Equal tokens on both sides: 4 rows of 512 random tokens, each a target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.row import Bound, Row

STEPS, ROWS, LENGTH = 4, 4, 512
SIZE = "40m"


def prepare(folder: Path, size: str = SIZE) -> None:
    inputs.make_model(folder / "model", size)
    inputs.make_tokenizer(folder / "model", 1000)


def ids(size: str) -> Any:
    return inputs.random_ids(STEPS * ROWS, LENGTH, inputs.SIZES[size][-1])


def itune(folder: Path, dtype: str = "float32", size: str = SIZE, **sections: Any) -> dict[str, Any]:
    from benchmarks import ours

    config = ours.config_of(
        folder, compat="trl", **sections, model={"compute_dtype": dtype}, train={"batch_size": ROWS},
        data={"max_length": LENGTH, "packing": False}, optimizer={"weight_decay": 0.1},
    )  # fmt: skip
    return ours.timed(config, ours.data_of_ids(config, ids(size)))


def trl(folder: Path, dtype: str = "float32", size: str = SIZE) -> dict[str, Any]:
    import datasets

    from benchmarks import peer

    rows = ids(size).tolist()
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})
    made = peer.trainer(folder, dataset, dtype=dtype, per_device_train_batch_size=ROWS, max_length=LENGTH,
                        weight_decay=0.1)  # fmt: skip
    return peer.timed(made)


ROW = Row(
    title="Training, 40M-parameter Llama, 4 rows of 512 tokens, every token a target, float32, no rematerialisation.",
    sides={"itune": itune, "trl": trl},
    prepare=prepare,
    equal=(("losses", 1e-4),),
    bounds=(Bound("tokens_per_second", at_least=1.10, busy="tokens_per_cpu_second"),),
)
