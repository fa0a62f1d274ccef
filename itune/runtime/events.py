"""What a run says, for machines: `logs/process-<i>.jsonl`, one object a line with time, process and step."""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itune.runtime.secrets import redact_tree
from itune.writers import dump

LAST = 50  # events that a crash record holds


class EventLog:
    """The events of one process: appended to its file, all attempts of a run after one another; `last` has the newest.

    A disk that is full or gone never ends a run here: the checkpoint and the metrics say so, with what to do.
    """

    def __init__(self, workdir: Path, process: int = 0) -> None:
        self.path, self.process = log_path(workdir, process), process
        self.last: collections.deque[Mapping[str, Any]] = collections.deque(maxlen=LAST)
        self._stream: Any = None

    def write(self, step: int, event: str, **values: Any) -> None:
        """`event` names what happened (log, step, start, failed); secrets in it are hidden."""
        record = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "process": self.process, "step": step, "event": event,
                  **values}
        line = dump(redact_tree(record))
        self.last.append(json.loads(line))
        with contextlib.suppress(OSError):
            if self._stream is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._stream = self.path.open("a")
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            self._stream = None


def log_path(workdir: Path, process: int = 0) -> Path:
    return workdir / "logs" / f"process-{process}.jsonl"


def read_last(workdir: Path, process: int = 0) -> list[Any]:
    """The last events of a process that is gone, oldest first; a line that was cut short is left out."""
    path = log_path(workdir, process)
    if not path.is_file():
        return []
    lines: collections.deque[str] = collections.deque(maxlen=LAST)
    with path.open(errors="replace") as stream:
        lines.extend(line for line in stream if line.endswith("\n"))
    return [json.loads(line) for line in lines]
