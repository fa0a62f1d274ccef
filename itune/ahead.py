"""The training step, compiled in a thread while the data are read: on a CPU either takes seconds."""

from __future__ import annotations

import dataclasses
import gc
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax

from itune.config import Config
from itune.plan.inputs import stand_in
from itune.setup_run import Plan, make_plan


class Ahead:
    """Compiles early where the data cannot change the program: steps given, one process, no kernel made for the rows.

    Only on CPUs: a TPU's compilation takes minutes, which wrong data would have to wait for when they end the run.
    """

    def __init__(self, config: Config, early: bool = True) -> None:
        self._config, self._early = config, early
        self._compiling: Future[Any] | None = None

    def begin(self, tokenizer: Any) -> None:
        """Start, now that the tokenizer is known: the vocabulary may grow by its tokens."""
        if self._early and self._config.train.max_steps and jax.process_count() == 1 and jax.default_backend() == "cpu":
            pool = ThreadPoolExecutor(1)
            self._compiling = pool.submit(self._compile, tokenizer)
            pool.shutdown(wait=False)

    def _compile(self, tokenizer: Any) -> Any:
        judging = dataclasses.replace(self._config.eval, patience=0)  # the program does not judge
        config = dataclasses.replace(self._config, evaluators=(), eval=judging)
        data = dataclasses.replace(stand_in(config, config.train.max_steps), tokenizer=tokenizer)
        return compiled(make_plan(config, data, lambda line: None))

    def step(self, plan: Plan) -> Any:
        """The compiled step of the plan; with it the start is over, and garbage is collected again."""
        step = self._compiling.result() if self._compiling else compiled(plan)
        gc.enable()
        return step


def compiled(plan: Plan) -> Any:
    return plan.step.lower(plan.state, plan.batch).compile()
