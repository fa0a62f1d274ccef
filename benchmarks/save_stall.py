"""What checkpoints cost a run: the stall of the step at a save every 20 steps, for a model of 100M parameters.

    python benchmarks/save_stall.py [--size 100m] [--steps 60] [--every 20] [--rows 8] [--length 256] [--workdir DIR]

Prints one JSON line: seconds that calls to `save` kept the loop waiting (all but the last save, which the run waits for
anyway), the step time between saves, and the same run without saves as the baseline. The disk is that of `--workdir`.
Needs 4 GB of memory at 100m; run it alone, since both numbers are wall-clock.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).parents[1] / "scripts"


def make_inputs(folder: Path, size: str) -> None:
    subprocess.run([sys.executable, SCRIPTS / "make_random_model.py", "--size", size, "--out", folder / "model"],
                   check=True, stdout=subprocess.DEVNULL)
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(2000):
            answer = " ".join(str(number + n) for n in range(40))
            rows.write(json.dumps({"messages": [{"role": "user", "content": f"Count from {number}"},
                                                {"role": "assistant", "content": answer}]}) + "\n")


def run(folder: Path, name: str, arguments: argparse.Namespace, every: int) -> tuple[list[float], dict]:
    """(seconds of each step, the run's summary) of one training run."""
    from itune import load_config, train

    config = load_config("default", {
        "model.path": str(folder / "model"), "data.train": str(folder / "rows.jsonl"),
        "data.max_length": arguments.length, "data.cache_dir": str(folder / "cache"), "evaluators": (),
        "train.batch_size": arguments.rows, "train.max_steps": arguments.steps, "train.epochs": 100.0,
        "checkpoint.every": every, "checkpoint.keep": 1, "log.every": 1, "log.tensorboard": False,
    })
    ends: list[float] = []
    result = train(config, folder / name, on_step=lambda step, metrics: ends.append(time.perf_counter()))
    newest = folder / name / "checkpoints" / str(result.step)
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    shutil.rmtree(folder / name)
    return [b - a for a, b in itertools.pairwise(ends)], {**result.summary, "checkpoint_bytes": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="100m")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=20)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--workdir", default=None, help="a folder on the disk to measure (default: the temporary one)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.workdir) as made:
        folder = Path(made)
        make_inputs(folder, arguments.size)
        plain, _ = run(folder, "plain", arguments, every=0)
        saving, summary = run(folder, "saving", arguments, every=arguments.every)
    step = statistics.median(plain)
    saves = arguments.steps // arguments.every
    stall = summary["checkpoint_stall"]
    print(json.dumps({
        "benchmark": "save_stall", "model": arguments.size, "rows": arguments.rows, "length": arguments.length,
        "every": arguments.every, "saves": saves, "checkpoint_bytes": summary["checkpoint_bytes"],
        "step_seconds": step, "stall_seconds_per_save": stall / saves,
        "stall_share": stall / saves / (arguments.every * step),  # of the time of the steps between two saves
        "whole_run_share": sum(saving) / sum(plain) - 1,  # hashing and writing beside the steps included
    }))


if __name__ == "__main__":
    main()
