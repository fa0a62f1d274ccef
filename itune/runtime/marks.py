"""Marks: the phases of a run, written where a supervisor or a fault campaign reads them, and nowhere by default.

`ITUNE_MARK=FILE` gets a line `phase step` a mark: step, logged, save-begin, arrays-written, before-commit, committed,
retained, evaluate-begin, evaluated; of a workdir in a bucket upload-begin, uploading (an object is there),
before-manifest, uploaded. `ITUNE_MARK_KILL=phase:step` makes the process kill itself (SIGKILL) there, and
`phase:step:SIGTERM` or another signal's name send itself that one: how the tests show that nothing is lost, without a
clock. Several are separated by commas.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal


def mark(phase: str, step: int | str) -> None:
    """Say that `phase` was reached at `step`. A reader that is gone or slow never holds the run up."""
    if path := os.environ.get("ITUNE_MARK"):
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            os.write(_open(path), f"{phase} {step}\n".encode())
    if planned := os.environ.get("ITUNE_MARK_KILL"):
        for entry in planned.split(","):
            name, _, rest = entry.partition(":")
            at, _, number = rest.partition(":")
            if (name, at) == (phase, str(step)):
                os.kill(os.getpid(), signal.Signals[number or "SIGKILL"])


@functools.lru_cache(maxsize=1)
def _open(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
