"""One run directory, one run."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from itune.types import InputError, RunError


class RunLock:
    """Holds `run.lock` in a run directory while the block runs.

    The kernel releases the lock when the process dies, however it dies, so a file left behind by a killed run is
    recognised as stale. Raises RunError naming host, process and start of the run that holds it, InputError where the
    folder cannot be written.
    """

    def __init__(self, workdir: str | os.PathLike) -> None:
        self.path = Path(workdir) / "run.lock"
        self._handle = -1

    def __enter__(self) -> RunLock:
        try:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise InputError(f"--workdir {self.path.parent}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._handle, 4096)
            os.close(self._handle)
            raise RunError(
                f"{self.path.parent} is in use by another run{_describe(holder)}; wait for it, stop it, or choose "
                "another --workdir"
            ) from None
        start = time.strftime("%Y-%m-%d %H:%M:%S")
        text = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start}) + "\n"
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, text.encode(), 0)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.ftruncate(self._handle, 0)
        os.close(self._handle)


def _describe(holder: bytes) -> str:
    try:
        facts = json.loads(holder)
        return f" (host {facts['host']}, process {facts['pid']}, started {facts['start']})"
    except (ValueError, KeyError, TypeError):
        return ""
