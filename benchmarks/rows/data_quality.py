"""Speed and memory of the data filters, and their accuracy on planted defects; see benchmarks/data_quality.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from benchmarks.row import Row, script_lines


def itune(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for line in script_lines("data_quality.py", "--data", os.environ["ITUNE_BENCH_DATA"], "--seeds", "201"):
        for name, value in line.items():
            value = value.get("rate") if isinstance(value, dict) else value
            if isinstance(value, int | float) and name != "n":
                found[f"{line['row']}: {name}"] = value
    return found


ROW = Row(
    title="Data filters: rates on one planted seed, CPU-seconds and memory over 100,000 rows.",
    sides={"itune": itune},
    repeats=1,
    timeout=900,
)
