"""Cost of preparing 1,000 to 1,000,000 short examples, and the memory of the process that trains on them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.row import Bound, Row

COUNTS = (1_000, 10_000, 100_000, 1_000_000)
PREPARE = """
import json, resource, sys
from pathlib import Path
from benchmarks import ours
from benchmarks.row import Clock
folder, count = Path(sys.argv[1]), sys.argv[2]
def config_of(name):
    data = {"train": str(folder / f"{name}.jsonl"), "max_length": 128, "quality": ours.without_filters()}
    return ours.config_of(folder, data=data)
config = config_of(count)
ours.data_of_rows(config_of("warm"))
clock = Clock()
ours.data_of_rows(config)
print(json.dumps({"cpu": clock.read()[1], "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""
TRAIN = """
import json, resource, sys
from pathlib import Path
from benchmarks import ours
folder, count = Path(sys.argv[1]), sys.argv[2]
data = {"train": str(folder / f"{count}.jsonl"), "max_length": 128, "quality": ours.without_filters()}
config = ours.config_of(folder, data=data, train={"max_steps": 3, "batch_size": 8})
ours.timed(config, ours.data_of_rows(config))
print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def prepare(folder: Path) -> None:
    inputs.make_model(folder / "model", "15m")
    inputs.make_tokenizer(folder / "model", 8192)
    for name, count in [("warm", 300), *((str(count), count) for count in COUNTS)]:
        with (folder / f"{name}.jsonl").open("w") as stream:
            for i in range(count):
                row = {"prompt": f"What is {i} and {i * 7 % 1000} in words, number {name}?",
                       "completion": f"It is {i + i * 7 % 1000}."}  # fmt: skip
                stream.write(json.dumps(row) + "\n")


def child(code: str, folder: Path, count: int) -> dict[str, float]:
    command = [sys.executable, "-c", code, str(folder), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def itune(folder: Path) -> dict[str, Any]:
    import numpy as np

    result: dict[str, Any] = {}
    cpu = []
    for count in COUNTS:
        cpu.append(child(PREPARE, folder, count)["cpu"])
        result[f"cpu_seconds_{count}"] = cpu[-1]
    # from 10,000 rows up: below, what is done once hides what a row costs
    result["exponent"] = float(np.polyfit(np.log(COUNTS[1:]), np.log(cpu[1:]), 1)[0])
    few, many = (child(TRAIN, folder, count)["peak"] for count in (COUNTS[0], COUNTS[-1]))
    peaks = {"training_peak_gb_1000": few / 1e6, "training_peak_gb_1000000": many / 1e6}
    return result | {"memory_ratio": many / few} | peaks


ROW = Row(
    title="Preparing 1,000 to 1,000,000 short conversations, and the memory of the process that trains on them.",
    note="Filters are off. The exponent is that of CPU-seconds from 10,000 rows up; memory is that of training on what "
    "was prepared.",
    sides={"itune": itune},
    prepare=prepare,
    repeats=1,
    timeout=900,
    bounds=(
        Bound("exponent", at_most=1.05, absolute=True),
        Bound("memory_ratio", at_most=1.05, absolute=True),
    ),
)
