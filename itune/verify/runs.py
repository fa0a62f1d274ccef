"""Pairs that need whole runs: `itune.train` itself, interrupted, in two processes, and its export."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from itune.export import export_run
from itune.loop import Result, train
from itune.models import load_pretrained
from itune.runtime.secrets import redact
from itune.saved_run import LoadedRun, load_run
from itune.setup_run import model_settings
from itune.types import InputError, RunError
from itune.verify.bench import Bench, tensors
from itune.verify.devices import cpu_environment
from itune.verify.small import STEPS, changed, quiet
from itune.verify.table import BOUNDS, EXACT, Numbers, Row, compare, relative
from itune.writers import read_metrics

TIMEOUT = 600  # seconds for the two processes, compilation included


def resumed(bench: Bench) -> Row:
    """A run that is stopped by a signal in its middle and started again, against one that is left alone."""
    if threading.current_thread() is not threading.main_thread():
        raise InputError("signals reach a program's main thread only, and this is another")

    def interrupt(step: int, metrics: Mapping[str, Any]) -> None:
        if step == STEPS // 2:
            signal.raise_signal(signal.SIGTERM)

    folder = bench.folder / "interrupted"
    stopped = _train(bench, folder, interrupt)
    if not stopped.preempted:
        raise RunError(f"the run in {folder} was told to stop after step {STEPS // 2} and went on to {stopped.step}")
    _train(bench, folder)
    exact = jax.devices()[0].platform != "gpu" or bench.config.train.deterministic
    row = Row("", compare(_numbers(folder), _numbers(uninterrupted(bench))), dict(EXACT if exact else BOUNDS))
    return row if exact else _with_reason(row, "bitwise only under train.deterministic on GPU")


def two_processes(bench: Bench) -> Row:
    """A job of two processes on loopback, four CPU devices each, against one process with eight."""
    if jax.devices()[0].platform != "cpu" or jax.device_count() != 8:
        raise InputError("needs eight CPU devices (JAX_PLATFORMS=cpu in the environment gives them)")
    folder = bench.folder / "two-processes"
    (bench.folder / "two-processes.json").write_text(json.dumps(bench.config.to_dict()))
    command = [sys.executable, "-m", "itune", "train", "--config", str(bench.folder / "two-processes.json"),
               "--workdir", str(folder)]  # fmt: skip
    with contextlib.ExitStack() as stack:
        port, processes, logs = _free_port(), [], []
        for index in range(2):
            logs.append(bench.folder / f"process-{index}.log")
            stream = stack.enter_context(logs[-1].open("w"))
            processes.append(subprocess.Popen(command, env=_environment(index, port), stdout=stream, stderr=stream))
            stack.callback(_end, processes[-1])
        try:
            codes = [process.wait(TIMEOUT) for process in processes]
        except subprocess.TimeoutExpired as error:
            raise RunError(f"two processes have not ended within {TIMEOUT} s") from error
    if any(codes):
        said = next(log for log, code in zip(logs, codes, strict=True) if code).read_text(errors="replace").strip()
        raise RunError(f"two processes ended with exit codes {codes}: {redact(said.splitlines()[-1] if said else '')}")
    return Row("", compare(_numbers(folder), _numbers(uninterrupted(bench))), dict(BOUNDS))


def exported(bench: Bench) -> Row:
    """The folder that a run exports, loaded as any model is, against the parameters in the run's checkpoint."""
    folder = bench.folder / "export"
    export_run(uninterrupted(bench), folder, dtype="float32", log=quiet)
    run = _load(uninterrupted(bench))
    config = changed(run.config, {"model.path": str(folder), "model.revision": ""})
    model, params = load_pretrained(folder, run.model.mesh, **model_settings(config, run.tokenizer))
    trained = run.tuning.merged(*run.halves)
    losses = [bench.held_out_loss(model, each, 16) for each in (params, trained)]
    same = compare(_of(tensors(model, params)), _of(tensors(model, trained)))
    return Row("", {"loss": relative(*losses), "parameters": same["parameters"]}, dict(EXACT))


def uninterrupted(bench: Bench) -> Path:
    """The run directory of a run over all devices that nothing disturbs; made when it is first asked for."""
    folder = bench.folder / "uninterrupted"
    if not (folder / "summary.json").is_file():
        _train(bench, folder)
    return folder


def _train(bench: Bench, folder: Path, on_step: Callable[[int, Mapping[str, Any]], None] | None = None) -> Result:
    """`itune.train`, what it says in a log file beside its directory."""
    with folder.with_suffix(".log").open("a") as stream, contextlib.redirect_stdout(stream):
        return train(bench.config, folder, on_step=on_step)


def _numbers(folder: Path) -> Numbers:
    run, logged = _load(folder), read_metrics(folder / "metrics.jsonl")
    losses, norms = (np.array([row[name] for row in logged]) for name in ("loss", "grad_norm"))
    if len(losses) != STEPS:
        raise RunError(f"{folder / 'metrics.jsonl'} has {len(losses)} steps; expected {STEPS}")
    return Numbers(losses, norms, tensors(run.model, run.halves[0]))


def _load(folder: Path) -> LoadedRun:
    return load_run(folder, log=quiet)


def _of(params: dict[str, np.ndarray]) -> Numbers:
    return Numbers(np.ones(1), np.ones(1), params)


def _with_reason(row: Row, reason: str) -> Row:
    return Row(row.name, row.differences, row.bounds, reason)


def _environment(index: int, port: int) -> dict[str, str]:
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {
        **cpu_environment(4), "PYTHONPATH": path,
        "ITUNE_COORDINATOR": f"127.0.0.1:{port}", "ITUNE_NUM_PROCESSES": "2", "ITUNE_PROCESS_ID": str(index),
        "ITUNE_SUPERVISED": str(os.getpid()),  # we are the parent that such a run wants
    }  # fmt: skip


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(process: subprocess.Popen) -> None:
    if process.poll() is None:
        process.kill()
        process.wait()
