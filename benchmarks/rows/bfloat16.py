"""The dense row in bfloat16, published as it is."""

from __future__ import annotations

import functools

from benchmarks.row import Row
from benchmarks.rows import dense

ROW = Row(
    title="The dense row with bfloat16 products over float32 weights (TRL: autocast).",
    note="No bound. By themselves torch's bfloat16 products are faster than XLA's, twice as fast on an Intel Xeon.",
    sides={
        "itune": functools.partial(dense.itune, dtype="bfloat16"),
        "trl": functools.partial(dense.trl, dtype="bfloat16"),
    },
    prepare=dense.prepare,
    equal=(("first_loss", 0.05),),
)
