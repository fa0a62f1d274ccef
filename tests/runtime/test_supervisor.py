"""The supervisor says how a run ended, starts it again while that brings new steps, and passes signals on."""

import json
import os
import signal
import subprocess
import sys

import pytest

from itune.runtime import supervisor
from itune.types import InputError

SAY = "import os, signal, sys, time\nfrom itune.runtime.marks import mark\n"


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(supervisor, "_PAUSE", 0.0)
    for name in ("ITUNE_SUPERVISED", "ITUNE_MARK", *supervisor._TASK_COUNTS):
        monkeypatch.delenv(name, raising=False)


def run(code, restarts=0):
    return supervisor.supervise([sys.executable, "-c", SAY + code], restarts)


@pytest.mark.parametrize("code", [0, 2, 143])
def test_final_codes_are_passed_on_and_never_restarted(code, tmp_path):
    runs = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')\n"
    assert run(f"{runs}sys.exit({code})", restarts=3) == code
    assert (tmp_path / "runs").read_text() == "x"


def test_abort_is_said_with_host_and_last_step(capfd):
    assert run("mark('step', 40); mark('step', 41); os.abort()") == 1
    err = capfd.readouterr().err
    assert f"itune: the run on host {os.uname().nodename} ended by SIGABRT; last finished step: 41\n" in err


def test_run_killed_before_it_could_say_why_leaves_a_record(tmp_path, capfd, monkeypatch):
    """The last 50 events come from its log; a secret in its output is hidden in all that is passed on."""
    monkeypatch.setenv("HF_TOKEN", "canary-canary")
    code = (SAY + f"from pathlib import Path\nfrom itune.runtime.events import EventLog\n"
            f"log = EventLog(Path({str(tmp_path)!r}))\n"
            "for step in range(1, 61):\n    log.write(step, 'step', loss=1.0)\n    mark('step', step)\n"
            "print('using canary-canary', file=sys.stderr, flush=True)\nos.abort()")
    (tmp_path / "config.json").write_text('{"seed": 7}')
    assert supervisor.supervise([sys.executable, "-c", code], 0, tmp_path) == 1
    err = capfd.readouterr().err
    assert f"ended by SIGABRT; last finished step: 60 (details: {tmp_path}/crash.json)" in err
    record = json.loads((tmp_path / "crash.json").read_text())
    assert [event["step"] for event in record["last_events"]] == list(range(11, 61))
    assert record["config"] == {"seed": 7} and "SIGABRT" in record["error"] and record["step"] == 60
    assert "using [hidden]" in err and "using [hidden]\n" in record["last_output"]
    assert "canary-canary" not in err + (tmp_path / "crash.json").read_text()


def test_record_that_the_run_wrote_itself_stays(tmp_path, capfd):
    path = tmp_path / "crash.json"
    path.write_text("of an earlier run")
    code = f"import os, sys; os.replace({str(tmp_path / 'new')!r}, {str(path)!r}); sys.exit(1)"
    (tmp_path / "new").write_text("of this run")
    assert supervisor.supervise([sys.executable, "-c", code], 0, tmp_path) == 1
    assert path.read_text() == "of this run" and f"(details: {path})" in capfd.readouterr().err
    assert supervisor.supervise([sys.executable, "-c", "import sys; sys.exit(1)"], 0, tmp_path) == 1
    assert "with exit code 1" in json.loads(path.read_text())["error"]  # the old record is not taken for its own


def test_crash_loop_ends_and_new_steps_go_on(tmp_path, capfd):
    count = f"p = {str(tmp_path / 'runs')!r}\nopen(p, 'a').write('x')\nn = len(open(p).read())\n"
    assert run(f"{count}mark('step', 5); sys.exit(1)", restarts=2) == 1
    assert "given up after 2 restarts without a new step (last step: 5)" in capfd.readouterr().err
    assert (tmp_path / "runs").read_text() == "xxx"
    (tmp_path / "runs").unlink()
    assert run(f"{count}mark('step', n)\nsys.exit(n < 6)", restarts=1) == 0  # each run gets a step further
    assert (tmp_path / "runs").read_text() == "xxxxxx"


def test_signal_is_passed_on_and_ends_it_without_restart():
    before = signal.getsignal(signal.SIGTERM)
    code = ("signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
            "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(60)")
    assert run(code, restarts=5) == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_launcher_and_supervisor_are_one_request():
    code = ("from itune.runtime.signals import StopRequest\n"
            "with StopRequest() as stop:\n"
            "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGTERM)\n"
            "    sys.exit(143 if stop.requested else 1)")
    assert run(code) == 143


def test_run_is_told_when_its_supervisor_dies(tmp_path):
    told = tmp_path / "told"
    child = (SAY + "from itune.runtime.supervisor import end_with_parent\nend_with_parent()\n"
             f"signal.signal(signal.SIGTERM, lambda *_: (open({str(told)!r}, 'w').write('SIGTERM'), os._exit(0)))\n"
             "os.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(60)")
    code = f"import sys\nfrom itune.runtime.supervisor import supervise\nsupervise([sys.executable, '-c', {child!r}])"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, timeout=60)  # waits for both
    assert done.returncode == -9 and told.read_text() == "SIGTERM"


@pytest.mark.parametrize("line", [
    "task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout. This indicates that the remote task has failed",
    "coordination_service.cc:1549] UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\n"
    "The tasks have crashed. Check the task logs for an earlier error",
])
def test_lost_process_is_named_by_its_host(monkeypatch, capfd, line):
    monkeypatch.setenv("ITUNE_NUM_PROCESSES", "2")
    monkeypatch.setenv("ITUNE_PROCESS_ID", "0")
    assert run(f"mark('hosts', 'left,right'); print({line!r}, file=sys.stderr); os.abort()") == 1
    assert "gone or silent for more than 100 s: process 1 (right)" in capfd.readouterr().err


def test_when_it_is_wanted(monkeypatch):
    assert not supervisor.wanted(0) and supervisor.wanted(1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert supervisor.wanted(0)
    monkeypatch.setenv("ITUNE_SUPERVISED", "1")
    assert not supervisor.wanted(3)
    monkeypatch.setenv("ITUNE_HEARTBEAT", "soon")
    with pytest.raises(InputError, match=r"ITUNE_HEARTBEAT must be whole seconds.* found 'soon'"):
        supervisor.heartbeat_seconds()
