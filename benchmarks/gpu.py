#!/usr/bin/env python3
"""Speed of itune on one NVIDIA GPU, one JSON line a row; needs what scripts/gpu_check.sh needs and no network.

    python -m benchmarks.gpu [ROW ...] [--seconds N]     # every row, each in a process of its own
    python -m benchmarks.gpu --tiny                      # the same code in tiny form, on any device
    python -m benchmarks.gpu --compile gpu:h200:1        # no GPU: the rows' programs and their memory

gemm          matrix products, 8192 cubed, bfloat16: what this card can do
attention     cuDNN on packed rows against the whole square in float32: output and gradients, and milliseconds
cross_entropy forward and backward of the head, T 16,384 x V 248,320 x D 2,048, bfloat16
full_1b       Llama-3.2-1B, all parameters, float32 weights, 16 rows of 2,048
full_8b       Llama-3.1-8B, all parameters, bfloat16 weights with stochastic rounding, rows of 4,096
experts       six layers of Qwen3-30B-A3B, all parameters, 8 rows of 2,048; the layer against a sum over all experts
lora_8b       Llama-3.1-8B, LoRA of rank 16 on all projections, rows of 4,096
lora_8b_packed the same on packed conversations, 8 to 32 in a row
torch_lora_8b peft on transformers: whole rows, then packed conversations kept apart

MFU is stated with its formula, its peak, causal attention, and packed lengths counted as they are.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

from itune.runtime.cuda import take_memory

ROWS = (
    "gemm", "attention", "cross_entropy", "full_1b", "full_8b", "lora_8b", "lora_8b_packed", "torch_lora_8b",
    "experts",
)  # fmt: skip
COMPILED = ("cross_entropy", "full_1b", "full_8b", "lora_8b", "lora_8b_packed", "experts")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"any of {', '.join(ROWS)}")
    parser.add_argument("--seconds", type=float, default=500, help="no row starts after this (500)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, on any device")
    parser.add_argument("--compile", metavar="GPU", help="compile only, for a GPU as in itune plan")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := [row for row in given.rows if row.partition(":")[0] not in ROWS]:
        parser.error(f"no row {unknown[0]}; there are {', '.join(ROWS)}")
    if given.here:
        run_here(given.rows[0], given.tiny, given.compile)
        return 0
    start, failed, environment = time.monotonic(), [], dict(os.environ)
    as_asked = [*(["--tiny"] if given.tiny else []), *(["--compile", given.compile] if given.compile else [])]
    if given.compile:
        if refused := [row for row in given.rows if row.partition(":")[0] not in COMPILED]:
            parser.error(f"row {refused[0]} is not compiled alone; those that are: {', '.join(COMPILED)}")
        environment["JAX_PLATFORMS"] = "cpu"
    for row in given.rows or (COMPILED if given.compile else ROWS):
        left = given.seconds - (time.monotonic() - start)
        if left <= 0:
            say(row, skipped=f"the {given.seconds:.0f} s were over")
            continue
        command = [sys.executable, "-m", "benchmarks.gpu", row, "--here", *as_asked]
        try:
            code = subprocess.run(command, timeout=left, env=environment).returncode
        except subprocess.TimeoutExpired:
            code = f"no end within {left:.0f} s"
        if code:
            failed.append(row)
            say(row, failed=code)
    return 1 if failed else 0


def say(row: str, **values: Any) -> None:
    print(json.dumps({"row": row, **values}), flush=True)


def run_here(row: str, tiny: bool, compiled_for: str | None = None) -> None:
    """One row in this process. ROW:key=value:... overrides the row's settings, to try things out."""
    name, *settings = row.split(":")
    options = {key: json.loads(value) for key, value in (part.split("=", 1) for part in settings)}
    options |= {"compiled_for": compiled_for} if compiled_for else {}
    take_memory(0.95)
    place = {"torch_lora_8b": "gpu_torch", "experts": "gpu_experts"}.get(name, "gpu_rows")
    values = getattr(importlib.import_module(f"benchmarks.{place}"), name)(tiny, **options)
    for one in values if isinstance(values, list) else [values]:
        say(row, **one)


def milliseconds(run: Any, wait: Any, repeats: int = 10) -> float:
    """Median of `repeats` timed calls after two that are not; `wait` blocks until a result is there."""
    times = []
    for number in range(repeats + 2):
        begin = time.perf_counter()
        wait(run())
        if number > 1:
            times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


if __name__ == "__main__":
    sys.exit(main())
