"""When a run is judged, what was found at each step, and whether it still gets better."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from itune import evaluators
from itune.checkpoint.retention import lower_is_better
from itune.config import Config
from itune.types import InputError


class Judge:
    """The evaluations of one run. What was found is kept in memory, so that processes never differ about it.

    A decision to stop is a pure function of the evaluations up to a step: a resumed run, whose later evaluations were
    cut away, comes to the same one.
    """

    def __init__(self, config: Config, workdir: Path) -> None:
        self.config, self.workdir = config, workdir
        self.results: dict[int, dict[str, Any]] = {}

    def resume(self, step: int, log: Callable[[str], None]) -> None:
        """Take up what the run directory holds of evaluations up to `step`. A damaged summary counts as none."""
        for path in (self.workdir / "eval").glob("*/summary.json"):
            try:
                evaluators.read_summaries(path)
            except InputError as error:
                log(f"warning: {error}; it counts as absent and now stands in damaged-{path.name} there")
                if jax.process_index() == 0:
                    path.replace(path.with_name(f"damaged-{path.name}"))
        steps = [int(path.name) for path in (self.workdir / "eval").glob("[0-9]*") if path.name.isdecimal()]
        self.results = {found: read_summary(self.workdir, found) for found in sorted(steps) if found <= step}

    def due(self, step: int) -> bool:
        every = self.config.eval.every
        return step == 0 or bool(every and step % every == 0)

    def waiting(self, step: int) -> list[str]:
        """The evaluators that have no result at this step yet."""
        found = self.results.setdefault(step, {})
        return [name for name in self.config.evaluators if evaluators.short_name(name) not in found]

    def enter(self, step: int, name: str, summary: Mapping[str, Any]) -> None:
        self.results.setdefault(step, {})[evaluators.short_name(name)] = dict(summary)

    def stalled(self) -> str:
        """Why training ends here: `eval.metric` has not improved for `eval.patience` evaluations; "" where it goes on.

        The evaluation before the first step counts. An improvement is larger than `eval.min_delta`; a value that is not
        finite is none. Raises InputError for a metric that the evaluators do not give.
        """
        settings = self.config.eval
        if not settings.patience:
            return ""
        sign = 1.0 if lower_is_better(settings.metric) else -1.0
        best, best_step, since = math.inf, 0, 0
        for step in sorted(self.results):
            numbers = evaluators.flatten(self.results[step])
            if settings.metric not in numbers:
                self._check_given(step, numbers)
                continue  # its evaluator has not run yet
            value = sign * numbers[settings.metric]
            if math.isfinite(value) and value < best - (settings.min_delta if math.isfinite(best) else 0.0):
                best, best_step, since = value, step, 0
            else:
                since += 1
        if since < settings.patience:
            return ""
        found = f"its best is {sign * best:.6g} at step {best_step}" if math.isfinite(best) else "it was never finite"
        return (f"{settings.metric} has not improved for {since} evaluations; {found} "
                f"(eval.patience={settings.patience})")

    def _check_given(self, step: int, numbers: Mapping[str, float]) -> None:
        metric = self.config.eval.metric
        evaluator = metric.partition("/")[0]
        if evaluator in self.results[step]:
            given = [name for name in sorted(numbers) if name.startswith(f"{evaluator}/")]
            near = difflib.get_close_matches(metric, given, n=1)
            raise InputError(f"eval.metric: {evaluator} gives no {metric!r}; "
                             + (f"did you mean {near[0]}?" if near else f"it gives {', '.join(given)}"))


def check_patience(config: Config) -> None:
    """Raise InputError, before anything is computed, where `eval.patience` could never act."""
    settings = config.eval
    if not settings.patience:
        return
    names = [evaluators.short_name(name) for name in config.evaluators]
    if not settings.every:
        raise InputError(f"eval.patience={settings.patience} needs evaluations during training; set eval.every")
    if settings.metric.partition("/")[0] not in names:
        raise InputError(f"eval.metric: {settings.metric!r} is of no evaluator of this run; expected EVALUATOR/NUMBER "
                         f"such as heldout_loss/loss, with one of {', '.join(names) or 'no evaluator at all'}")


def read_summary(workdir: Path, step: int) -> dict[str, Any]:
    """{evaluator: summary} of a step as the run directory has it; {} where there is none, or a damaged one."""
    try:
        return evaluators.read_summaries(workdir / "eval" / str(step) / "summary.json")
    except InputError:
        return {}
