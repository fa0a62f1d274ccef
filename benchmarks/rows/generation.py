"""Greedy generation against transformers: both engines in turn in one process, see benchmarks/generation.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.row import Bound, Row, script_lines


def itune(folder: Path) -> dict[str, Any]:
    *engines, both = script_lines("generation.py", "--rounds", "5")
    found = {f"{each['engine']}_{name}": each[name] for each in engines
             for name in ("tokens_per_second", "tokens_per_cpu_second")}  # fmt: skip
    return found | {name: both[name] for name in ("ratio", "cpu_ratio", "same_answers")}


ROW = Row(
    title="Greedy generation, 15M-parameter Qwen3, 64 ragged prompts and 64 new tokens in one batch, float32.",
    note="ratio: tokens a second over those of transformers, best of five rounds.",
    sides={"itune": itune},
    repeats=1,
    bounds=(Bound("ratio", at_least=1.0, busy="cpu_ratio", absolute=True),),
)
