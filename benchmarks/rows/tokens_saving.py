"""The row `tokens` with the peer's gradient checkpointing on, SFTConfig's default: slower, in less memory."""

from __future__ import annotations

import functools

from benchmarks.row import Row
from benchmarks.rows import tokens

ROW = Row(
    title="The row tokens with TRL's default gradient checkpointing, which computes every layer twice to save memory.",
    note="itune as in tokens: train.remat=dots.",
    sides={
        "itune": tokens.itune,
        "trl": functools.partial(tokens.trl, gradient_checkpointing=True),
        "trl_packed": functools.partial(tokens.packed, gradient_checkpointing=True),
    },
    prepare=tokens.prepare,
    equal=tokens.ROW.equal,
    bounds=tokens.ROW.bounds,
)
