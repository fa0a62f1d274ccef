"""From the command to the end of the first optimizer step, with warm caches and with none."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks import inputs
from benchmarks.row import Bound, Row, cpu_seconds

PEER = """
import datasets, transformers, os, sys
from benchmarks import peer
from pathlib import Path
class Stop(transformers.TrainerCallback):
    def on_step_end(self, *_, **__):
        print("first step", flush=True)
        os._exit(0)
folder = Path(sys.argv[1])
dataset = datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train")
made = peer.trainer(folder, dataset, packing=True, packing_strategy="bfd", max_length=512,
                    per_device_train_batch_size=1, gradient_accumulation_steps=4)
made.add_callback(Stop())
made.train()
"""


def prepare(folder: Path) -> None:
    inputs.make_model(folder / "model", "15m")
    inputs.make_tokenizer(folder / "model", 8192)
    inputs.write_rows(folder / "rows.jsonl", inputs.rows(1000, gsm8k_only=True))


def until_first_step(command: list[str], folder: Path, cold: bool) -> dict[str, Any]:
    """Seconds until the command prints that its first step is done, or ends. Warm: the same was run before."""
    if cold:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    begun, cpu = time.perf_counter(), cpu_seconds()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        seconds = 0.0
        for line in process.stdout:
            if line.startswith(("first step", "step 1/")) and not seconds:
                seconds = time.perf_counter() - begun
        code = process.wait()
    if not seconds or code:
        raise RuntimeError(f"exit code {code}, first step seen: {bool(seconds)}")
    return {"seconds": seconds, "cpu_seconds": cpu_seconds() - cpu}


def itune(folder: Path, length: str = "max_steps=1") -> dict[str, Any]:
    command = [
        sys.executable, "-m", "itune", "train", "--config", "default", "--workdir", str(folder / "run"),
        f"--config.model.path={folder / 'model'}", f"--config.data.train={folder / 'rows.jsonl'}",
        "--config.evaluators=()", "--config.data.max_length=512", f"--config.train.{length}",
        "--config.train.batch_size=4", "--config.log.tensorboard=False", "--config.checkpoint.every=0",
    ]  # fmt: skip
    return both(command, folder)


def trl(folder: Path) -> dict[str, Any]:
    return both([sys.executable, "-c", PEER, str(folder)], folder)


def both(command: list[str], folder: Path) -> dict[str, Any]:
    found = {}
    for name, cold in (("cold", True), ("warm", False)):
        shutil.rmtree(folder / "run", ignore_errors=True)
        found |= {f"{name}_{key}": value for key, value in until_first_step(command, folder, cold).items()}
    return found


ROW = Row(
    title="From the command to the end of the first optimizer step: 15M-parameter Llama, 1,000 conversations of GSM8K, "
    "4 packed rows of 512.",
    note="cold: no compiled program, no tokenised data; warm: the second start. Both pack, so that the step has the "
    "same tokens (each row a micro-batch of the peer, as in the row tokens). CPU-seconds of itune hold its whole "
    "command, with the checkpoint that it saves; the peer leaves after the step. "
    "itune_epochs: the length given in epochs, as in the recipes: the steps are known, and the program is compiled, "
    "once the data are packed.",
    sides={"itune": itune, "trl": trl, "itune_epochs": functools.partial(itune, length="epochs=0.001")},
    prepare=prepare,
    repeats=11,  # medians of five swing around the bounds with the machine
    bounds=(
        Bound("warm_seconds", at_most=0.5, busy="warm_cpu_seconds"),
        Bound("cold_seconds", at_most=1.0, busy="cold_cpu_seconds"),
    ),
)
