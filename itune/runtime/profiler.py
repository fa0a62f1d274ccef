"""A trace of a few steps, for XProf and Perfetto."""

from __future__ import annotations

from pathlib import Path

import jax

from itune.types import InputError


class Profiler:
    """Traces the steps that `profile.steps` names ("10:13": steps 10 to 13, counted from 1) into `profile/`."""

    def __init__(self, steps: str, workdir: Path) -> None:
        self.folder, self._running = workdir / "profile", False
        self._from, self._to = 0, 0
        if steps:
            begin, _, end = steps.partition(":")
            if not (begin.isdecimal() and end.isdecimal() and 1 <= int(begin) <= int(end)):
                raise InputError(f"config: profile.steps must be first:last such as 10:13, found {steps!r}")
            self._from, self._to = int(begin), int(end)

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int) -> None:
        """Called before step + 1 runs."""
        if step + 1 == self._from:
            jax.profiler.start_trace(self.folder)
            self._running = True
        elif step == self._to:
            self._end()

    def __exit__(self, *error: object) -> None:
        self._end()

    def _end(self) -> None:
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
