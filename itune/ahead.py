"""The training step, compiled in a thread while the data are read: on a CPU either takes seconds."""

from __future__ import annotations

import dataclasses
import gc
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from itune.config import Config
from itune.kept_step import Compiled, are_used, compile_step
from itune.plan.inputs import stand_in
from itune.setup_run import Plan, make_plan, training_only


class Ahead:
    """Compiles early where the data cannot change the program: steps given, one process, no kernel made for the rows.

    Only on CPUs: a TPU's compilation takes minutes, which wrong data would have to wait for when they end the run.
    """

    def __init__(self, config: Config, early: bool = True) -> None:
        self._config, self._early, self._keep = config, early, are_used()
        self._compiling: Future[Compiled] | None = None
        self._unsettled: Compiled | None = None
        # a template may add tokens, for which the embedding grows; a hub id may be absent, or take long to fetch
        if config.data.train and not config.data.chat_template and Path(config.model.path or "?").is_dir():
            self.begin()

    def begin(self, tokenizer: Any = None) -> None:
        """Start if that has not been done, with the tokenizer where it may have added tokens."""
        may = self._early and self._config.train.max_steps and not self._compiling
        if may and jax.process_count() == 1 and jax.default_backend() == "cpu":
            self._compiling = _beside(self._compile, tokenizer)

    def _compile(self, tokenizer: Any) -> Compiled:
        config = training_only(self._config)
        data = stand_in(config, config.train.max_steps)
        data = dataclasses.replace(data, tokenizer=tokenizer or data.tokenizer)
        return compile_step(make_plan(config, data, lambda line: None), self._keep)

    def step(self, plan: Plan) -> Any:
        """The compiled step of the plan; with it the start is over, and garbage is collected again."""
        self._unsettled = self._compiling.result() if self._compiling else compile_step(plan, self._keep)
        gc.enable()
        return self._unsettled.step

    def settle(self, plan: Plan) -> None:
        """Once the first step has run, and once: see whether its program was this plan's (`Compiled.settle`)."""
        if self._unsettled:
            self._unsettled.settle(plan)
            self._unsettled = None

    def distrust(self) -> None:
        """The run failed: if that was before its step was settled, no other run takes that step."""
        if self._unsettled:
            self._unsettled.forget()


def _beside(call: Any, *given: Any) -> Future[Any]:
    pool = ThreadPoolExecutor(1)
    future = pool.submit(call, *given)
    pool.shutdown(wait=False)
    return future
