"""A parent that outlives the run: it says which host failed after which step, and starts the run again when asked to.

jax ends the survivors of a job from C++, without a word from Python, when one process dies or hangs. The parent reads
the child's marks (`runtime/marks.py`), passes signals on, and needs neither jax nor a device.
"""

from __future__ import annotations

import collections
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itune.runtime.crash import crash_path, write_crash
from itune.runtime.events import read_last
from itune.runtime.secrets import redact
from itune.types import InputError

_FINAL = (0, 2, 130, 143)  # done, wrong input, interrupted, preempted: starting again changes nothing
_TASK_COUNTS = ("ITUNE_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")
_PR_SET_PDEATHSIG = 1
_PAUSE = 1.0  # seconds, times the failures in a row, before a restart


def wanted(restarts: int) -> bool:
    """Whether this process is to supervise: restarts were asked for, or the environment announces several processes."""
    return "ITUNE_SUPERVISED" not in os.environ and (restarts > 0 or announced_processes() > 1)


def announced_processes() -> int:
    counts = (os.environ.get(name, "") for name in _TASK_COUNTS)
    return max([1, *(int(count) for count in counts if count.isdecimal())])


def own_process() -> int:
    """The number of this process in the job that the environment announces; 0 when it announces none."""
    numbers = (os.environ.get(name, "") for name in ("ITUNE_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"))
    return next((int(number) for number in numbers if number.isdecimal()), 0)


def heartbeat_seconds() -> int:
    """ITUNE_HEARTBEAT: seconds of silence after which the processes of a job give one of them up (default 100)."""
    text = os.environ.get("ITUNE_HEARTBEAT") or "100"
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"environment: ITUNE_HEARTBEAT must be whole seconds, at least 1, found {text!r}")
    return int(text)


def end_with_parent() -> None:
    """In a supervised process: get SIGTERM when the supervisor dies, so that no run stays without one."""
    if parent := os.environ.get("ITUNE_SUPERVISED"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(parent):
            os.kill(os.getpid(), signal.SIGTERM)


def supervise(command: Sequence[str], restarts: int = 0, workdir: str | os.PathLike | None = None) -> int:
    """Run `command` until it ends, again after a failure, and return its exit code (1 for a signal).

    It gives up after `restarts` restarts that brought no new step. `workdir`, the run directory of the command, is
    where the record of a failure stands; when the run was killed before it could write one, it is written here.
    """
    failures, best = 0, -1
    while True:
        before = _record_found(workdir)
        run = SupervisedRun(command)
        code = run.wait()
        if code in _FINAL or run.asked_to_stop:
            return code if code >= 0 else 1
        failures = 1 if run.step > best else failures + 1
        best = max(best, run.step)
        line = run.describe(code)
        if workdir is not None:
            line += f" ({_record_of(run, line, Path(workdir), before)})"
        _say(line)
        if failures > restarts:
            if restarts:
                _say(f"given up after {restarts} restarts without a new step (last step: {max(best, 0)})")
            return 1
        _say(f"restart {failures} of at most {restarts} without a new step, from the newest good checkpoint")
        time.sleep(min(failures * _PAUSE, 30))


class SupervisedRun:
    """One child process: its last finished step, the end of its standard error, and the hosts of its job."""

    def __init__(self, command: Sequence[str]) -> None:
        self.step, self.hosts, self.asked_to_stop = -1, [socket.gethostname()], False
        self.said: collections.deque[str] = collections.deque(maxlen=200)
        marks, marked = os.pipe()
        environment = {**os.environ, "ITUNE_SUPERVISED": str(os.getpid()), "ITUNE_MARK": f"/dev/fd/{marked}"}
        before = {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
        self._restore = lambda: [signal.signal(number, handler) for number, handler in before.items()]
        # a session of its own: Ctrl-C reaches the child once, through us
        self._process = subprocess.Popen(
            command, env=environment, pass_fds=(marked,), stderr=subprocess.PIPE, start_new_session=True
        )
        os.close(marked)
        self._readers = [threading.Thread(target=self._read_marks, args=(marks,)),
                         threading.Thread(target=self._read_errors)]
        for reader in self._readers:
            reader.start()

    def wait(self) -> int:
        """The exit code of the child. A process of a job that stands stopped longer than the heartbeat is killed."""
        stopped_at: float | None = None
        while self._process.poll() is None:
            time.sleep(0.1)
            if announced_processes() > 1:
                stopped_at = (stopped_at or time.monotonic()) if _is_stopped(self._process.pid) else None
                if stopped_at and time.monotonic() - stopped_at > heartbeat_seconds():
                    self._process.kill()
        for reader in self._readers:
            reader.join()
        self._restore()
        return self._process.returncode

    def describe(self, code: int) -> str:
        """One line: which host ended how, after which step, and which process of the job was given up."""
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        line = f"the run on host {socket.gethostname()} ended {how}; last finished step: {max(self.step, 0)}"
        lost = _lost_processes("".join(self.said))
        own = os.environ.get("ITUNE_PROCESS_ID", "")
        names = [f"process {index} ({self.hosts[index] if index < len(self.hosts) else 'host unknown'})"
                 for index in sorted(lost) if str(index) != own]
        if names:
            line += f"; gone or silent for more than {heartbeat_seconds()} s: {', '.join(names)}"
        elif own not in ("", "0") and code < 0 and any("coordination" in text.lower() for text in self.said):
            line += f"; the coordinator, process 0 ({self.hosts[0]}), is gone or silent"
        return line

    def _pass_on(self, number: int, frame: object) -> None:
        self.asked_to_stop = True
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _read_marks(self, handle: int) -> None:
        with os.fdopen(handle) as stream:
            for line in stream:
                phase, _, value = line.rstrip("\n").partition(" ")
                if phase == "step":
                    self.step = max(self.step, int(value))
                elif phase == "hosts":
                    self.hosts = value.split(",")

    def _read_errors(self) -> None:
        assert self._process.stderr
        for raw in iter(self._process.stderr.readline, b""):
            line = redact(raw.decode(errors="replace"))
            self.said.append(line)
            os.write(2, line.encode())


def _record_found(workdir: str | os.PathLike | None) -> tuple[int, int] | None:
    """What tells one crash record from the next, without a clock."""
    path = crash_path(Path(workdir or "."), own_process())
    if not path.is_file():
        return None
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def _record_of(run: SupervisedRun, line: str, workdir: Path, before: tuple[int, int] | None) -> str:
    """Where the record of the failed run is; writes one when it left none, from what it wrote before."""
    process = own_process()
    if _record_found(workdir) not in (None, before):
        return f"details: {crash_path(workdir, process)}"
    return write_crash(workdir, line, {
        "step": max(run.step, 0), "hosts": run.hosts, "last_events": read_last(workdir, process),
        "last_output": list(run.said)[-50:], "environment": _read(workdir / "environment.json"),
        "config": _read(workdir / "config.json"),
    }, process)


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# "Task 1 heartbeat timeout" or "/job:jax_worker/replica:0/task:1 ..."; or a list below a line, which one depends on
# who noticed first
_LOST = re.compile(r"task[: ](\d+)\b.{0,200}(?:heartbeat|unhealthy|died|disconnected|unavailable)", re.IGNORECASE)
_LOST_LIST = re.compile(r"tasks are unhealthy[^\n]*:\n((?:\d+\n)+)")


def _lost_processes(said: str) -> set[int]:
    listed = (int(number) for found in _LOST_LIST.finditer(said) for number in found[1].split())
    return {*(int(found[1]) for found in _LOST.finditer(said)), *listed}


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _say(text: str) -> None:
    print(f"itune: {text}", file=sys.stderr, flush=True)
