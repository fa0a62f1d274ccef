"""A trace of a few steps, for XProf and Perfetto, and where their time went in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax

from itune.runtime.trace import INPUT, STEPS, Shares, read_shares
from itune.types import InputError
from itune.writers import write_atomically


def traced_steps(steps: str) -> tuple[int, int]:
    """(first, last) of `profile.steps`, (0, 0) where it is empty. Raises InputError for what is no such range."""
    if not steps:
        return 0, 0
    begin, _, end = steps.partition(":")
    if not (begin.isdecimal() and end.isdecimal() and 1 <= int(begin) <= int(end)):
        raise InputError(f"config: profile.steps must be first:last such as 10:13, found {steps!r}")
    return int(begin), int(end)


class Profiler:
    """Traces the steps that `profile.steps` names ("10:13": steps 10 to 13, counted from 1) into `profile/`.

    The folder is what XProf and TensorBoard open: `plugins/profile/steps-10-13/process-<i>.xplane.pb`, one file a
    process. `profile/summary.json` holds `itune.runtime.trace.Shares`, `summary-<i>.json` those of the devices of a
    further process, and `log` gets them as a line. Nothing that goes wrong with a trace ends the run.
    """

    def __init__(self, steps: str, workdir: Path, log: Callable[[str], None]) -> None:
        self.folder, self.log = workdir / "profile", log
        self._from, self._to = traced_steps(steps)
        self._begun, self._now = 0, 0
        self._window: Any = None

    def __enter__(self) -> Profiler:
        return self

    def watch(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Pass what feeds the loop through, marking in the trace how long the loop waits for it."""
        iterator = iter(batches)
        while True:
            with jax.profiler.TraceAnnotation(INPUT):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def due(self, step: int) -> bool:
        """Whether `switch` has something to do before step + 1 runs: the caller first waits for all earlier steps."""
        self._now = step
        return step == self._to if self._window else self._from <= step + 1 <= self._to and not self._begun

    def switch(self, step: int) -> None:
        """Begin the trace before step + 1, or end it after `step`, when the devices have nothing left to do."""
        if self._window:
            self._end(step)
        else:
            self._begin(step + 1)

    def step(self, step: int) -> Any:
        """Context of step + 1's dispatch, by which XProf tells steps apart."""
        self._now = step + 1
        return jax.profiler.StepTraceAnnotation("train", step_num=step + 1)

    def __exit__(self, kind: type | None, *error: object) -> None:
        if self._window:
            self._end(self._now, summary=kind is None)
        elif self._from and not self._begun and kind is None:
            self.log(f"profile.steps={self._from}:{self._to}: none of these steps was run here; nothing was traced")

    def _begin(self, first: int) -> None:
        self._begun = first
        self._session = self.folder / "plugins" / "profile" / f"steps-{first}-{self._to}"
        if jax.process_index() == 0:
            shutil.rmtree(self._session, ignore_errors=True)  # of a run that was killed; XProf keeps what it computed
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # a record of every Python call would slow the loop that it shows
        try:
            jax.profiler.start_trace(self._own_folder(), profiler_options=options)
        except Exception as error:  # another trace of this process, say
            self.log(f"warning: profile.steps={self._from}:{self._to}: no trace was begun ({error})")
            return
        self._window = jax.profiler.TraceAnnotation(STEPS)
        self._window.__enter__()

    def _end(self, last: int, summary: bool = True) -> None:
        self._window.__exit__(None, None, None)
        self._window = None
        steps = f"profile of steps {self._begun} to {last}"
        try:
            jax.profiler.stop_trace()
            path = self._collect()
            if summary:
                shares = read_shares(path)
                self._write(last, shares, path)
                self.log(f"{steps}: {shares.line()}: {self.folder}")
        except Exception as error:  # whatever is wrong with a trace, the run goes on
            said = str(error) or type(error).__name__
            self.log(f"warning: {steps}: no summary could be made ({said}); the trace, if there is one: {self.folder}")

    def _own_folder(self) -> Path:
        return self.folder / f".process-{jax.process_index()}"

    def _collect(self) -> Path:
        """Move this process's trace into the session of all: jax names files by host, and a host may run several."""
        own = self._own_folder()
        self._session.mkdir(parents=True, exist_ok=True)
        for path in own.glob("plugins/profile/*/*"):
            ending = next((end for end in (".xplane.pb", ".trace.json.gz") if path.name.endswith(end)), f".{path.name}")
            path.replace(self._session / f"process-{jax.process_index()}{ending}")
        shutil.rmtree(own)
        return self._session / f"process-{jax.process_index()}.xplane.pb"

    def _write(self, last: int, shares: Shares, path: Path) -> None:
        content = {"steps": [self._begun, last], **shares._asdict(), "trace": str(path.relative_to(self.folder))}
        name = f"summary-{index}.json" if (index := jax.process_index()) else "summary.json"
        write_atomically(self.folder / name, json.dumps(content, indent=1) + "\n")
