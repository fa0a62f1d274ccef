"""What the user sees while a run goes: a bar in a terminal, a plain line every few steps elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TextIO, cast

from itune import flops
from itune.runtime.output import Output


class Progress:
    """Shows steps, and takes lines of text in between. A run outlives its output: what it lacks then is in its files.

    Args:
      terminal: a bar (True), plain lines (False), or what standard output is (None).
      quiet: show nothing at all (the processes other than the first).
    """

    def __init__(self, *, terminal: bool | None = None, quiet: bool = False) -> None:
        self._output = Output()
        self._terminal = (self._output.isatty() if terminal is None else terminal) and not quiet
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self.total, self._done, self._started = 0, 0, 0.0

    def begin(self, total: int, done: int = 0) -> None:
        """Steps start: `total` of the whole run, of which an earlier process has `done`."""
        self.total = total
        self.start_clock(done)
        if self._terminal:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                BarColumn(bar_width=10), MofNCompleteColumn(), TextColumn("{task.fields[facts]}"),  # fits 80 columns
                refresh_per_second=2, console=Console(file=cast(TextIO, self._output)),
            )
            self._task = self._bar.add_task("train", total=total, completed=done, facts="")
            self._bar.start()

    def log(self, text: str) -> None:
        """A line of text, above the bar."""
        if self._bar:
            self._bar.console.print(text, highlight=False, markup=False)
        elif not self._quiet:
            print(text, file=self._output, flush=True)

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """A logged step: updates the bar, or prints a plain line."""
        facts = describe(values, self.seconds_left(step))
        if self._bar:
            self._bar.update(self._task, completed=step, facts=" ".join(facts))
        elif not self._quiet:
            facts.insert(1, f"lr {values['learning_rate']:.2e}")
            print("  ".join([f"step {step}/{self.total}", *facts]), file=self._output, flush=True)

    def advance(self, step: int) -> None:
        """A step that is not logged moves the bar only."""
        if self._bar:
            self._bar.update(self._task, completed=step)

    def start_clock(self, step: int) -> None:
        """Time left is reckoned from here: again after an evaluation, which is no step."""
        self._started, self._done = time.monotonic(), step

    def seconds_left(self, step: int) -> float | None:
        ran = step - self._done
        return (time.monotonic() - self._started) / ran * (self.total - step) if ran > 0 else None

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def describe(values: Mapping[str, Any], seconds_left: float | None = None) -> list[str]:
    """loss 1.2345, 1,234 tok/s, mfu 41.2%, 1.20 GB, left 0:12:10; what is not known shows as -."""
    speed, mfu, memory = values.get("tokens_per_second"), values.get("mfu"), values.get("memory")
    return [
        f"loss {values['loss']:.4f}",
        f"{speed:,.0f} tok/s" if speed is not None else "- tok/s",
        f"mfu {mfu:.1%}" if mfu is not None else "mfu -",
        f"{memory / 1e9:.2f} GB" if memory is not None else "- GB",
        f"left {format_seconds(seconds_left)}",
    ]


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Meter:
    """Tokens a second and MFU since the last restart. Real tokens: padding is not counted."""

    def __init__(
        self, model: Any, devices: int, device_kind: str, share: float = 1, train_flops: Any = flops.train_flops
    ) -> None:
        """`model` is a ModelConfig; `devices` are those of the whole job; `share`: its rows over those counted here."""
        self.model, self.share, self.train_flops = model, share, train_flops
        peak = flops.peak_flops(device_kind)
        self.peak = peak * devices if peak else None
        self._pairs: dict[int, dict[int | None, float]] = {}
        self.restart()

    def count(self, batches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Pass host batches through, noting each one's (query, key) pairs; rows of other processes count as equal."""
        for step, batch in batches:
            pairs = flops.batch_pairs(self.model, batch)
            self._pairs[step + 1] = {window: n * self.share for window, n in pairs.items()}
            yield step, batch

    def add(self, step: int, values: Mapping[str, Any]) -> None:
        self._tokens += values["tokens"]
        self._flops += self.train_flops(self.model, values["tokens"], self._pairs.pop(step))

    def read(self) -> dict[str, Any]:
        seconds = time.monotonic() - self._begun
        return {"tokens_per_second": self._tokens / seconds,
                "mfu": self._flops / seconds / self.peak if self.peak else None}

    def restart(self) -> None:
        self._begun, self._tokens, self._flops = time.monotonic(), 0, 0.0
