"""Two processes on loopback train as one does; a signal to either stops both at the same step, saved."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
SCRIPT = Path(__file__).parents[1] / "scripts" / "make_random_model.py"


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    subprocess.run([sys.executable, SCRIPT, "--size", "1m", "--out", folder / "model"], check=True)
    with (folder / "rows.jsonl").open("w") as rows:
        for number in range(80):
            messages = [{"role": "user", "content": f"Say {number}"}, {"role": "assistant", "content": str(number)}]
            rows.write(json.dumps({"messages": messages}) + "\n")
    return [sys.executable, "-m", "itune", "train", "--config", "default", f"--config.model.path={folder / 'model'}",
            f"--config.data.train={folder / 'rows.jsonl'}", f"--config.data.cache_dir={folder / 'cache'}",
            "--config.data.max_length=64", "--config.data.held_out_share=0.1", "--config.log.every=1",
            "--config.optimizer.learning_rate=1e-3"]


def environment(devices, index=None, port=0):
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    if index is not None:
        env |= {"ITUNE_COORDINATOR": f"127.0.0.1:{port}", "ITUNE_NUM_PROCESSES": "2", "ITUNE_PROCESS_ID": str(index)}
    return env


def start_two(arguments, folder, **variables):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(arguments, env={**environment(2, index, port), **variables},
                         stdout=(folder / f"{index}.log").open("w"), stderr=subprocess.STDOUT)
        for index in range(2)
    ]


def losses(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_equal_one(command, tmp_path):
    arguments = [*command, "--config.train.max_steps=8"]
    subprocess.run([*arguments, "--workdir", str(tmp_path / "one")], env=environment(4), check=True, timeout=300)
    two = start_two([*arguments, "--workdir", str(tmp_path / "two")], tmp_path)
    assert [process.wait(300) for process in two] == [0, 0], (tmp_path / "0.log").read_text()
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-6)
    held = [json.loads((tmp_path / name / "eval" / "8" / "summary.json").read_text()) for name in ("one", "two")]
    assert held[1]["heldout_loss"]["loss"] == pytest.approx(held[0]["heldout_loss"]["loss"], rel=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_signal_to_either_stops_both_at_the_same_saved_step(command, tmp_path, victim):
    settings = ["--config.train.max_steps=5000", "--config.evaluators=()"]
    two = start_two([*command, *settings, "--workdir", str(tmp_path / "run")], tmp_path)
    log = tmp_path / "0.log"
    limit = time.monotonic() + 240
    while "step 5/" not in log.read_text() and time.monotonic() < limit and two[0].poll() is None:
        time.sleep(0.2)
    two[victim].send_signal(signal.SIGTERM)
    assert [process.wait(120) for process in two] == [143, 143], log.read_text()
    step = int(re.search(r"stopped by .*: step (\d+) of 5000 is saved", log.read_text())[1])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(step)]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_or_stopped_process_ends_the_job_with_a_line_that_names_it(command, tmp_path, number):
    """The run itself (not its supervisor) of process 1 is killed or stopped; process 0 leaves within the time-out."""
    settings = ["--config.train.max_steps=5000", "--config.evaluators=()"]
    two = start_two([*command, *settings, "--workdir", str(tmp_path / "run")], tmp_path, ITUNE_HEARTBEAT="10")
    log = tmp_path / "0.log"
    limit = time.monotonic() + 400
    while "step 5/" not in log.read_text() and time.monotonic() < limit and two[0].poll() is None:
        time.sleep(0.2)
    children = Path(f"/proc/{two[1].pid}/task/{two[1].pid}/children").read_text().split()
    os.kill(int(children[0]), number)
    begun = time.monotonic()
    assert two[0].wait(60) == 1, log.read_text()
    took = time.monotonic() - begun
    assert took < 10 + 5 + 5, took  # time-out, 5 s, and as much for a busy machine
    said = re.findall(r"itune: the run on host .*last finished step: \d+.*", log.read_text())
    assert len(said) == 1 and "process 1" in said[0], log.read_text()[-3000:]
    assert two[1].wait(60) == 1
