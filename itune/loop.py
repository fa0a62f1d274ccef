"""The loop: time, logs, checkpoints, evaluators. What has an effect outside the arrays is here or called here."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from itune import evaluators
from itune.ahead import Ahead
from itune.checkpoint import Store
from itune.checkpoint.mirror import mirrored
from itune.config import Config
from itune.evaluators import shown
from itune.feed import feed
from itune.judge import Judge, read_summary
from itune.progress import Meter, Progress, format_seconds
from itune.run_record import RunRecord
from itune.runtime import distributed
from itune.runtime.compilation import use_compilation_cache, use_deterministic_kernels
from itune.runtime.crash import explained, shown_to
from itune.runtime.environment import memory_in_use, process_age
from itune.runtime.lock import RunLock
from itune.runtime.marks import mark
from itune.runtime.permissions import shared_with_everyone
from itune.runtime.profiler import Profiler
from itune.runtime.secrets import redact
from itune.runtime.signals import StopRequest
from itune.runtime.watchdog import Watchdog
from itune.setup_run import check_resume, local_rows, make_plan
from itune.sharding import describe_sizes
from itune.skipped import Skipped
from itune.start_run import prepared
from itune.step import all_finite
from itune.storage.cache import local_workdir
from itune.tuning import frozen_digest
from itune.types import InputError, RunError
from itune.weights import first_state, resumed_state
from itune.writers import Writers, cut_back, mend_metrics

OnStep = Callable[[int, Mapping[str, Any]], None]
_SAVE, _STOP = 1, 2  # what processes ask of each other


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended: finished steps, the numbers of the last logged one, and what `summary.json` holds."""

    workdir: Path
    step: int
    total_steps: int
    metrics: dict[str, Any]
    summary: dict[str, Any]
    preempted: bool = False


def train(config: Config, workdir: str | Path, *, on_step: OnStep | None = None) -> Result:
    """Tune the model that `config` names, in a run directory, here or in a bucket; the same call resumes or extends it.

    `on_step(step, metrics)` is called with the number of finished steps when a step's numbers are there: after the next
    one was dispatched, so that the device never waits. SIGTERM and SIGINT end the run after a step with all saved
    (`preempted`). Raises InputError for what the user can put right, RunError when the run failed; `crash.json` then
    says more.
    """
    if config.train.deterministic:
        use_deterministic_kernels()
    distributed.start()
    use_compilation_cache()
    folder = local_workdir(workdir)
    first = jax.process_index() == 0
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--workdir {folder}: cannot be created: {error.strerror}") from error
    with RunLock(folder) if first else contextlib.nullcontext(), StopRequest() as stop, \
            mirrored(workdir, folder) as mirror:
        run = Run(config, folder, stop, on_step, mirror)
        try:
            with shown_to(run.log):
                return run.run()
        except (InputError, KeyboardInterrupt):
            raise
        except Exception as error:
            said = str(error) if isinstance(error, RunError) else f"failed after step {run.done}: {explained(error)}"
            raise RunError(f"{said} ({run.tell_failure(error)})") from error
        finally:
            run.close()


class Run:
    """One run of this process in its directory. `done` counts finished (dispatched) optimizer steps."""

    def __init__(self, config: Config, workdir: Path, stop: StopRequest, on_step: OnStep | None, mirror: Any) -> None:
        self.config, self.workdir, self.stop, self.on_step = config, workdir, stop, on_step
        self.first = jax.process_index() == 0
        self.progress = Progress(quiet=not self.first)
        self.record = RunRecord(config, workdir)
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.started = time.monotonic()
        self.done = 0
        self.saved_step = -1
        self.saved_at = self.started
        self.skipped = Skipped(config.train.max_skipped)
        self.judge = Judge(config, workdir)
        self.stalled = ""  # why it ends before its last step
        self.profiler = Profiler(config.profile.steps, workdir, self.log)
        self.metrics: dict[str, Any] = {}
        self.writers: Writers | None = None
        self.store = Store(
            workdir / "checkpoints", config.checkpoint.keep, config.checkpoint.keep_best,
            metrics=lambda step: evaluators.flatten(read_summary(workdir, step)), log=self.log,
            keep_every=config.checkpoint.keep_every, mirror=mirror,
        )

    def run(self) -> Result:
        self.record.start()
        if warning := shared_with_everyone(self.workdir):
            self.log(warning)
        self.store.open()
        saved, logged = None, mend_metrics(self.workdir / "metrics.jsonl", self.log, self.first)
        if (step := self.store.newest_good()) is not None:
            saved = self.store.read(step)
            check_resume(self.workdir, saved, self.config, None, self.log)
        self.ahead = Ahead(self.config, early=saved is None)  # a finished run needs no step
        with self._timed("data"):
            data = prepared(self.config, self.log, self.ahead.begin, fresh=saved is None)
        plan = make_plan(self.config, data, self.log)
        self.data, self.plan, self.total = data, plan, data.loader.total_steps
        if saved:
            check_resume(self.workdir, saved, self.config, data, self.log)
            self.done = self.saved_step = saved.step
            self.skipped.total, self.skipped.in_row = saved.data.get("skipped", (0, 0))
            self.judge.resume(self.done, self.log)
            self.stalled = self.judge.stalled()
            self.store.set_aside_after(saved.step)
            self.store.retain()  # a killed run may not have got to it
            self.metrics = dict(next((r for r in reversed(logged) if r["step"] <= self.done), {}))
            self.metrics.pop("step", None)
            if (self.stalled or self.done == self.total) and not self.judge.waiting(self.done):
                return self._finished_before()
            if (mesh := saved.data["mesh"]) != plan.mesh.shape:
                self.log(f"resumed on another mesh, {describe_sizes(mesh)} -> {describe_sizes(plan.mesh.shape)} "
                         "(changes by rounding)")
        elif logged:
            self.log(f"{self.workdir} holds a run without a checkpoint: it starts again from the beginning")
        saved_part = plan.state.replace(frozen={})
        self.store.check_space(saved_part)
        if warning := self.store.space_warning(saved_part):
            self.log(warning)
        self.record.write_facts(data, self.config)
        if self.first:
            log = self.config.log
            cut_back(self.workdir, self.done if saved else -1)
            self.writers = Writers(self.workdir, resumed_step=self.done, tensorboard=log.tensorboard, wandb=log.wandb,
                                   config=self.record.config)
        state, compiled = self._start_state(resumed=saved is not None)
        state, stopped = self._steps(state, compiled)
        self.progress.close()
        if not stopped:
            self._evaluate(state)
        return self._finish()

    def _start_state(self, resumed: bool) -> tuple[Any, Any]:
        """The state to go on from and the compiled step; it compiles while weights are read and the base is judged."""
        plan = self.plan
        with ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(self._timed("compile")(lambda: self.ahead.step(plan)))
            with self._timed("weights"):
                if resumed:
                    state = resumed_state(plan, self.store, self.done, self.data.tokenizer, self.log)
                    self.log(f"resumed from the checkpoint of step {self.done} of {self.total}")
                else:
                    state = first_state(plan, self.data.tokenizer, self.log)
                    jax.block_until_ready(state)
                self.frozen = frozen_digest(state.frozen)
            if self.judge.due(self.done):
                self._evaluate(state)
            step = compiling.result()
        distributed.meet("compiled")
        if jax.process_count() > 1:
            mark("hosts", ",".join(distributed.hosts()))
        return state, step

    def _steps(self, state: Any, compiled: Any) -> tuple[Any, bool]:
        """Train from `done` to `total`. Nothing here waits for the device but the metrics of the step before."""
        agreement = distributed.Agreement(self.plan.mesh)
        rows, own = self.config.train.batch_size, local_rows(self.plan.mesh, self.plan.batch)
        meter = Meter(self.plan.model.config, jax.device_count(), jax.devices()[0].device_kind,
                      rows / (own[1] - own[0]), self.plan.tuning.train_flops())
        batches = self.data.loader.iterate(self.done, rows=own)
        waiting: collections.deque[tuple[int, Any]] = collections.deque()
        self.progress.begin(self.total, self.done)
        meter.restart()
        watchdog = Watchdog(self.config.train.timeout, self._hung)
        asked, self.saved_at = agreement.exchange(self._wish()), time.monotonic()
        stopped = asked == _STOP
        with contextlib.closing(batches), self.profiler, watchdog:
            fed = feed(meter.count(batches), self.plan.mesh, first_row=own[0], rows=rows)
            for step, batch in () if stopped or self.stalled else self.profiler.watch(fed):
                if self.profiler.due(step):
                    self._read(waiting, meter, keep=0)
                    with watchdog.paused():
                        self.profiler.switch(step)
                    meter.restart()
                with self.profiler.step(step):
                    state, metrics = compiled(state, batch)
                self.done = step + 1
                waiting.append((self.done, metrics))
                self._read(waiting, meter, keep=1)
                self.store.check()
                watchdog.beat()
                asked = agreement.exchange(self._wish())
                stopped = asked == _STOP
                if stopped:
                    break
                # a wish is seen again by the step after it
                every = self.config.checkpoint.every
                save = (every and self.done % every == 0) or (asked == _SAVE and self.done > self.saved_step + 1)
                if not (save or self.judge.due(self.done)):
                    continue
                self._read(waiting, meter, keep=0)
                if save:
                    with self._timed("save"):
                        self._save(state)
                if self.judge.due(self.done):
                    with watchdog.paused():
                        self._evaluate(state)
                    if self.stalled:
                        break
                meter.restart()
                self.progress.start_clock(self.done)
            self._read(waiting, meter, keep=0)
        if self.saved_step != self.done:
            self._save(state)
        return state, stopped

    def _read(self, waiting: collections.deque[tuple[int, Any]], meter: Meter, keep: int) -> None:
        """Fetch the numbers of dispatched steps, the newest `keep` left out; log those that are due."""
        while len(waiting) > keep:
            step, metrics = waiting.popleft()
            values = {name: value.item() for name, value in jax.device_get(metrics).items()}
            if "first_step" not in self.seconds:
                self.seconds["first_step"] = time.monotonic() - self.started
                self.seconds["first_step_of_process"] = process_age()
            mark("step", step)
            if line := self.skipped.count(step, values, self._examples, self._kept):
                self.log(line)
            meter.add(step, values)
            if self.on_step:
                self.on_step(step, values)
            if step % self.config.log.every and step not in (1, self.total):
                self.progress.advance(step)
                continue
            self.metrics = {**values, **meter.read(), "memory": memory_in_use()}
            meter.restart()
            self.record.events.write(step, "step", **self.metrics)
            self.progress.show(step, self.metrics)
            if self.writers:
                self.writers.write(step, self.metrics)
            mark("logged", step)
        if "first_step" in self.seconds:  # while the device has the next one
            self.ahead.settle(self.plan)

    def _kept(self) -> str:
        self.store.close()  # a save that is under way counts once it has ended
        latest = self.store.latest()
        return "there is no checkpoint" if latest is None else f"the checkpoint of step {latest} is kept"

    def _examples(self, step: int) -> str:
        rows = [address for row in self.data.loader.addresses(step - 1) for address in row]
        return f"Its batch holds {len(rows)} examples: {', '.join(rows[:8])}{' ...' if len(rows) > 8 else ''}"

    def _hung(self, seconds: float) -> str:
        """What the watchdog says of the step that does not end, after a record of it was written."""
        step = self.done + 1
        text = f"step {step} has not ended for {seconds:.0f} s (train.timeout). {self._examples(step)}"
        return f"{text}; all stacks stand above ({self.tell_failure(RunError(text), wait=False)})"

    def _wish(self) -> int:
        """What this process asks of all at this step: to stop, to save because it is time, or nothing."""
        if self.stop.requested:
            return _STOP
        minutes = self.config.checkpoint.minutes
        return _SAVE if self.first and minutes and time.monotonic() - self.saved_at >= 60 * minutes else 0

    def _save(self, state: Any) -> None:
        """Begin a save in the background; what the step waits for it is counted in `seconds["save"]`."""
        if not _all_finite((state.trainable, state.opt_state)):
            raise RunError(f"step {self.done}: parameters or optimizer state are not finite; they are not saved")
        data = {"fingerprint": self.data.loader.fingerprint, "step": self.done, "total_steps": self.total,
                "seed": self.config.seed, "mesh": dict(self.plan.mesh.shape), "processes": jax.process_count(),
                "skipped": [self.skipped.total, self.skipped.in_row], "frozen": self.frozen,
                "source": self.record.source}
        self.store.save(self.done, state.replace(frozen={}), data=data, config=self.record.config)
        self.saved_step, self.saved_at = self.done, time.monotonic()

    def _evaluate(self, state: Any) -> None:
        """Run the evaluators that have no result at this step yet, unless the run is asked to stop."""
        folder, data = self.workdir / "eval" / str(self.done), self.data
        params = self.plan.tuning.parameters(state.trainable, state.frozen)
        for name in self.judge.waiting(self.done):
            if self.stop.requested and jax.process_count() == 1:
                break
            mark("evaluate-begin", self.done)
            with self._timed("evaluate"):
                results = evaluators.evaluate(
                    self.config, self.plan.model, params, data.tokenizer, data.dataset, folder, [name],
                    base_folder=folder.with_name("0") if self.done else None,
                )
            self.judge.enter(self.done, name, results[name])
            numbers = evaluators.flatten(results)
            self.log(f"step {self.done}  {name}: {shown.brief(results[name])}")
            if self.writers:
                self.writers.write_evaluation(self.done, numbers)
            mark("evaluated", self.done)
        self.stalled = self.judge.stalled()
        self.store.retain()

    def _finish(self) -> Result:
        self.store.wait()
        preempted = (self.done < self.total and not self.stalled) or bool(self.judge.waiting(self.done))
        if preempted:
            self.log(f"stopped by {self.stop.name or 'another process'}: step {self.done} of {self.total} is saved; "
                     "the same command goes on from there")
        elif self.done < self.total:
            self.log(f"finished early, at step {self.done} of {self.total}: {self.stalled}")
        else:
            self.log(f"finished: {self.total} steps in {self.workdir}; its steps waited "
                     f"{format_seconds(self.seconds['save'])} for checkpoints")
        summary = self.summary(preempted)
        self.record.write_end(summary)
        return Result(self.workdir, self.done, self.total, self.metrics, summary, preempted)

    def _finished_before(self) -> Result:
        further = "raise train.epochs or train.max_steps" if self.done == self.total else f"change it: {self.stalled}"
        self.log(f"{self.workdir} is finished with {self.done} steps; to go on, {further}")
        self.record.write_config()  # a path may have changed
        summary = self.record.read_end(self.done) or self.summary(False)  # it may have been killed before it wrote one
        self.record.write_end(summary)
        return Result(self.workdir, self.done, self.total, self.metrics, summary)

    def summary(self, preempted: bool) -> dict[str, Any]:
        return {
            "step": self.done, "total_steps": self.total, "preempted": preempted,
            "metrics": self.metrics, "stopped_early": self.stalled if self.done < self.total else "",
            "before": self.judge.results.get(0, {}),
            "after": self.judge.results.get(self.done, {}) if self.done else {},
            "packing_efficiency": self.data.loader.efficiency, "checkpoint_stall": self.seconds["save"],
            "seconds": {**self.seconds, "total": time.monotonic() - self.started},
        }

    def tell_failure(self, error: Exception, wait: bool = True) -> str:
        """Write the crash record, once a save that was under way has ended; returns where it is."""
        if hasattr(self, "ahead"):
            self.ahead.distrust()
        if wait:
            self.store.close()
        return self.record.write_failure(
            error, self.done, last_checkpoint=self.store.latest(), examples=self._in_flight())

    def _in_flight(self) -> dict[str, list[str]]:
        """Step -> addresses of its batch, for the last finished step and the one after it."""
        if not hasattr(self, "data"):
            return {}
        with contextlib.suppress(OSError, ValueError):  # the data may be what failed
            return {str(step): [a for row in self.data.loader.addresses(step - 1) for a in row]
                    for step in (self.done, self.done + 1) if 1 <= step <= self.total}  # fmt: skip
        return {}

    def log(self, text: str) -> None:
        text = redact(text)
        self.record.events.write(self.done, "log", text=text)
        self.progress.log(text)

    def close(self) -> None:
        self.progress.close()
        self.store.close()
        if self.writers:
            self.writers.close()
        self.record.events.close()

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        begun = time.monotonic()
        with jax.profiler.TraceAnnotation(f"itune/{phase}"):
            yield
        self.seconds[phase] += time.monotonic() - begun


_all_finite = jax.jit(all_finite)
