"""The dense row in bfloat16, published as it is: torch's bfloat16 products on CPU are faster than XLA's."""

from __future__ import annotations

import functools

from benchmarks.row import Row
from benchmarks.rows import dense

ROW = Row(
    title="The dense row with bfloat16 products over float32 weights (TRL: autocast).",
    note="No bound: torch's bfloat16 matrix products on CPU run at about twice the speed of XLA's.",
    sides={
        "itune": functools.partial(dense.itune, dtype="bfloat16"),
        "trl": functools.partial(dense.trl, dtype="bfloat16"),
    },
    prepare=dense.prepare,
    equal=(("first_loss", 0.05),),
)
