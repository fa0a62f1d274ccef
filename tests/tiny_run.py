"""For tests of faults: a model of one layer, 32 wide, 120 conversations, and the command that trains it on them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from load_script import load_script

from itune.config import Config, load_config

HERE = Path(__file__).parent


def make_inputs(folder: Path) -> None:
    """`model/` and `rows.jsonl` in `folder`."""
    maker = load_script("scripts/make_random_model.py")
    maker.choose_shape = lambda *given: (32, 1)
    maker.make("llama", 1_000_000, folder / "model", vocab=320)
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(120):
            messages = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": str(number)}]
            rows.write(json.dumps({"messages": messages}) + "\n")


def command(folder: Path, workdir: Path, *more: str) -> list[str]:
    """The words after `itune`."""
    return ["train", "--config", "default", "--workdir", str(workdir), f"--config.model.path={folder / 'model'}",
            f"--config.data.train={folder / 'rows.jsonl'}", "--config.data.max_length=48",
            "--config.data.held_out_share=0.1", "--config.log.every=1", "--config.log.tensorboard=False", *more]


def settings(folder: Path, **changes: object) -> Config:
    """The config of a run on them in this process, without evaluators; every step is logged."""
    return load_config("default", {
        "model.path": str(folder / "model"), "data.train": str(folder / "rows.jsonl"), "data.max_length": 48,
        "data.cache_dir": str(folder / "cache"), "train.batch_size": 8, "evaluators": (), "log.tensorboard": False,
        "log.every": 1, **changes,
    })  # fmt: skip


def devices(count: int) -> dict[str, str]:
    return {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}


def job(processes: int) -> list[dict[str, str]]:
    """The environment of each process of a job on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [{"ITUNE_COORDINATOR": f"127.0.0.1:{port}", "ITUNE_NUM_PROCESSES": str(processes),
             "ITUNE_PROCESS_ID": str(index)} for index in range(processes)]


def environment(folder: Path) -> dict[str, str]:
    """Of a process that runs plans or commands here: CPU, and caches that live as long as `folder`."""
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONWARNINGS": "ignore"}


def run_plans(folder: Path, name: str, plans: list, *, before: tuple[str, ...] = ()) -> list:
    """Exit codes of the plans (`killed_runs.py`); `before`: words of a command that starts the process, as unshare."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps(plans))
    done = subprocess.run([*before, sys.executable, HERE / "killed_runs.py", path], env=environment(folder),
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
