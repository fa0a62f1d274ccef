"""The row `dense` with a mixture of experts in every layer."""

from __future__ import annotations

import functools

from benchmarks.row import Bound, Row
from benchmarks.rows import dense

SIZE = "32 experts"

ROW = Row(
    title="Training, 49M-parameter Qwen3-MoE (6 layers of 32 experts, 4 a token), 4 rows of 512 tokens, every token a "
    "target, float32, no rematerialisation.",
    sides={
        "itune": functools.partial(dense.itune, size=SIZE, loss={"router_aux": 0.001}),
        "trl": functools.partial(dense.trl, size=SIZE),
    },
    note="Both with the routers' auxiliary loss, which TRL takes from the model's config.",
    prepare=functools.partial(dense.prepare, size=SIZE),
    equal=(("losses", 1e-4),),
    bounds=(Bound("tokens_per_second", at_least=1.0, busy="tokens_per_cpu_second"), Bound("peak_gb", at_most=1.0)),
)
