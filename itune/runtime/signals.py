"""SIGTERM and SIGINT: finish the step, save, leave. The second one leaves at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Context manager that turns the first signal into `requested` and the second into an immediate end (exit code 1).

    Handlers can only be installed in the main thread; elsewhere this changes nothing, and the program that called itune
    keeps its own.
    """

    def __init__(self) -> None:
        self.name = ""
        self._first_at = 0.0
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.name)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        # a launcher signals the supervisor and the run, and the supervisor passes its signal on: that is one request
        twice_told = "ITUNE_SUPERVISED" in os.environ and time.monotonic() - self._first_at < 1
        if self.name and not twice_told:
            os.write(2, f"itune: second {name}: leaving at once\n".encode())
            os._exit(1)
        if not self.name:
            self.name, self._first_at = name, time.monotonic()

