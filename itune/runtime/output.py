"""Standard output that may go away: the reader of a pipe, a terminal, the disk of a log."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any


def make_output_safe() -> None:
    """Give a process that was started without standard streams empty ones; a letter its encoding lacks is written as
    an escape."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (open for the life of the process)
    with contextlib.suppress(AttributeError):  # a stream of a program that calls us
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def drop_output() -> None:
    """Standard output leads nowhere from here, so that what Python still holds of it raises nothing at the end."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # it is no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Output:
    """Standard output for as long as it takes text; then it takes all and shows nothing. All else is the stream's."""

    def __init__(self) -> None:
        self._stream: Any = sys.stdout
        self.lost = self._stream is None

    def write(self, text: str) -> int:
        self._do("write", text)
        return len(text)

    def flush(self) -> None:
        self._do("flush")

    def isatty(self) -> bool:
        return not self.lost and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _do(self, method: str, *given: str) -> None:
        if self.lost:
            return
        try:
            getattr(self._stream, method)(*given)
        except OSError:
            self.lost = True
            drop_output()
