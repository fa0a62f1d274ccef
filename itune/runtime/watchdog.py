"""A step that never ends: all stacks, the step and its examples are written, then the process leaves."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType

_GRACE = 30.0  # seconds after which the C-level alarm speaks, when a library that keeps the interpreter's lock hangs


_PAUSE = 1.0  # seconds between two looks
_LONGEST = 1e9  # seconds that the C-level alarm can count


class Watchdog:
    """Context manager: the process leaves with exit code 1 when `beat` is not called for `seconds`.

    Args:
      seconds: the longest time a step may take; 0 is off.
      report: called with the seconds that have passed, before the process leaves; its text goes to standard error.
      clock, leave: for tests.
    """

    def __init__(
        self, seconds: float, report: Callable[[float], str], *, clock: Callable[[], float] = time.monotonic,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.seconds, self.report, self.clock, self.leave = seconds, report, clock, leave
        self._last: float | None = None
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watchdog:
        self.beat()
        if self.seconds:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        if self._thread:
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def beat(self) -> None:
        """A step has ended."""
        self._last = self.clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside may take as long as it takes: an evaluation."""
        self._last = None
        try:
            yield
        finally:
            self.beat()

    def look(self) -> bool:
        """Report and leave when the last beat is too long ago; whether it was."""
        last = self._last
        if last is None or self.clock() - last < self.seconds:
            return False
        faulthandler.dump_traceback(file=2, all_threads=True)
        text = self.report(self.clock() - last)
        os.write(2, f"itune: {text}\n".encode())
        self.leave(1)
        return True

    def _watch(self) -> None:
        pause = min(_PAUSE, self.seconds / 4)
        while not self._end.wait(pause):
            if self._last is not None:
                faulthandler.dump_traceback_later(min(self.seconds + _GRACE, _LONGEST), exit=True, file=2)
            else:
                faulthandler.cancel_dump_traceback_later()
            if self.look():
                return
