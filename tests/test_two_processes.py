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
from datetime import datetime
from pathlib import Path

import pytest
from tiny_run import command as tiny_command
from tiny_run import devices, job, make_inputs, run_plans

from itune.checkpoint import Store

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


def environment(count):
    return {**os.environ, "JAX_PLATFORMS": "cpu", **devices(count)}


def start_two(arguments, folder, own=({}, {}), **variables):
    """Two processes of one job; `own`: further variables of each, `variables` of both."""
    return [
        subprocess.Popen(arguments, env={**environment(2), **described, **variables, **own[index]},
                         stdout=(folder / f"{index}.log").open("w"), stderr=subprocess.STDOUT)
        for index, described in enumerate(job(2))
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


def test_twenty_signals_to_either_of_two_each_saved_at_one_step(tmp_path):
    """SIGTERM at a marked step, to the first or the second in turn: codes 143, one line, one checkpoint, none lost."""
    make_inputs(tmp_path)
    plans = []
    for number in range(20):
        arguments = tiny_command(tmp_path, tmp_path / f"run-{number}", "--config.train.batch_size=4",
                                 "--config.train.max_steps=400", "--config.evaluators=()")
        jobs = job(2)
        jobs[number % 2]["ITUNE_MARK_KILL"] = f"step:{3 + number}:SIGTERM"
        plans.append([{"arguments": arguments, "log": str(tmp_path / f"{number}-{index}.log"),
                       "environment": {**devices(2), **variables}} for index, variables in enumerate(jobs)])
    assert run_plans(tmp_path, "twenty", plans) == [[143, 143]] * 20
    took = []
    for number in range(20):
        said = re.findall(r"stopped by .*: step (\d+) of 400 is saved", (tmp_path / f"{number}-0.log").read_text())
        assert len(said) == 1 and (tmp_path / f"{number}-1.log").read_text().count("stopped by") == 0
        run = tmp_path / f"run-{number}"
        assert [path.name for path in (run / "checkpoints").iterdir()] == said
        assert len(losses(run)) == int(said[0]) <= 3 + number + 3  # every finished step is in it
        assert Store(run / "checkpoints").newest_good() == int(said[0])
        left = max((tmp_path / f"{number}-{index}.log.left").stat().st_mtime for index in range(2))
        took.append(left - before(run / "logs" / f"process-{number % 2}.jsonl", 3 + number))
    print(f"20 of 20: SIGTERM to both gone in at most {min(took):.1f} to {max(took):.1f} s")
    assert max(took) < 30, took  # the grace that TPU VMs and SLURM give


def before(log, step):
    """When the last step before `step` was logged, in whole seconds: no later than the signal at `step`."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    times = [line["time"] for line in lines if line["step"] is not None and line["step"] < step]
    return max(datetime.strptime(each, "%Y-%m-%dT%H:%M:%S%z").timestamp() for each in times)


@pytest.mark.parametrize("number", range(20))
def test_dead_or_stopped_process_ends_the_job_with_a_line_that_names_it(command, tmp_path, number):
    """The run itself (not its supervisor) of one of two is killed or stopped at step 5; all leave within the time-out.

    In turn SIGKILL and SIGSTOP, the coordinator and the other.
    """
    victim, signal_name, heartbeat = number // 2 % 2, ("SIGKILL", "SIGSTOP")[number % 2], 5
    settings = ["--config.train.max_steps=5000", "--config.evaluators=()"]
    arguments = [*command, *settings, "--workdir", str(tmp_path / "run")]
    own = [{}, {}]
    own[victim]["ITUNE_MARK_KILL"] = f"step:5:{signal_name}"
    two = start_two(arguments, tmp_path, own, ITUNE_HEARTBEAT=str(heartbeat))
    codes = [process.wait(400) for process in two]
    left = time.time()
    logs = [(tmp_path / f"{index}.log").read_text() for index in range(2)]
    assert codes == [1, 1], logs
    took = left - before(tmp_path / "run" / "logs" / f"process-{victim}.jsonl", 5)  # no less than since the signal
    print(f"{signal_name} to process {victim}: both gone after {took:.1f} s with a time-out of {heartbeat} s")
    assert took < heartbeat + 5, took
    host = socket.gethostname()
    said = [re.findall(r"itune: the run on host .*last finished step: \d+.*", log) for log in logs]
    assert [len(lines) for lines in said] == [1, 1], logs
    assert f"host {host} ended by SIGKILL; last finished step: 5" in said[victim][0]
    other = said[1 - victim][0]
    assert re.search(rf"process {victim} \({host}\)", other), other
    for index, name in enumerate(("crash.json", "crash-1.json")):
        assert f"(details: {tmp_path}/run/{name})" in said[index][0]
        assert json.loads((tmp_path / "run" / name).read_text())["last_events"][-1]["step"] >= 4
