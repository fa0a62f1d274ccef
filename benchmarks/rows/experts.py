"""The row `dense` with a mixture of experts in every layer."""

from __future__ import annotations

import functools
from pathlib import Path

from benchmarks import inputs
from benchmarks.row import Bound, Row
from benchmarks.rows import dense

SIZE = "32 experts"
_vocabulary = inputs.SIZES[SIZE][-1]


def prepare(folder: Path) -> None:
    inputs.make_model(folder / "model", SIZE)
    inputs.make_tokenizer(folder / "model", 1000)


ROW = Row(
    title="Training, 49M-parameter Qwen3-MoE (6 layers of 32 experts, 4 a token), 4 rows of 512 tokens, every token a "
    "target, float32, no rematerialisation.",
    sides={
        "itune": functools.partial(dense.itune, vocabulary=_vocabulary, loss={"router_aux": 0.001}),
        "trl": functools.partial(dense.trl, vocabulary=_vocabulary),
    },
    note="Both with the routers' auxiliary loss, which TRL takes from the model's config.",
    prepare=prepare,
    equal=(("losses", 1e-4),),
    bounds=(Bound("tokens_per_second", at_least=1.0, busy="tokens_per_cpu_second"), Bound("peak_gb", at_most=1.0)),
)
