"""Updates that were not made: counted over the whole life of a run, told, and fatal when too many come in a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from itune.types import RunError


class Skipped:
    """`total` counts skipped updates; `in_row` those with a loss or gradient that was not finite, since the last good.

    `limit`: so many of the latter in a row end the run. A spike is skipped and counted, but ends nothing: the window
    that it is judged by follows the loss.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = self.in_row = 0

    def count(self, step: int, values: dict[str, Any], examples: Callable[[int], str], kept: Callable[[], str]) -> str:
        """Take `finite` and `spike` out of a step's numbers, put `skipped` in; a line about a skipped update, or ''.

        Raises RunError at the limit. `examples(step)` and `kept()` word the batch and the checkpoint that stays.
        """
        finite, spike = values.pop("finite"), values.pop("spike", False)
        self.total += spike or not finite
        self.in_row = 0 if finite else self.in_row + 1
        values["skipped"] = self.total
        if finite and not spike:
            return ""
        what = "a spike (train.skip_spikes)" if finite else "not finite"
        row = "" if finite else f" ({self.in_row} in a row)"
        text = (f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: {what}; the update was "
                f"skipped{row}. {examples(step)}")
        if self.in_row >= self.limit:
            raise RunError(f"{text}; {kept()}")
        return text
