"""The step that an earlier start compiled, found by what it is made from: nothing is traced before the first step.

jax's own cache goes by the lowered program, and lowering takes longer than loading what it was compiled to. A step that
is found is trusted until the run has its first numbers: `Compiled.settle` then lowers the program and compares, before
anything is saved.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import json
import os
import platform
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import jaxlib
import numpy as np
import optax
from jax.experimental import serialize_executable

from itune.setup_run import Plan
from itune.storage.cache import cache_folder, code_digest
from itune.types import RunError

KEEP = 64  # files, the last used ones; a step of scanned layers is one or two megabytes
_SECTIONS = ("model", "train", "optimizer", "loss", "lora", "mesh")  # of the config: what a plan is made of
_OTHERS = ("epochs", "max_steps", "init_from", "max_skipped", "timeout")  # keys there that decide nothing of a step
_on = contextvars.ContextVar("kept steps are used", default=False)


@contextlib.contextmanager
def kept_steps() -> Iterator[None]:
    """Use them inside. For the command only: a program that calls `itune.train` may have changed any of our code."""
    token = _on.set(True)
    try:
        yield
    finally:
        _on.reset(token)


def are_used() -> bool:
    return _on.get()


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step. `program`: hash of what it was lowered from; `file`: where it is kept, or shall be; `found`:
    it comes from there."""

    step: Any
    program: str = ""
    file: Path | None = None
    found: bool = False

    def settle(self, plan: Plan) -> None:
        """Compare the step with the program of `plan`, and keep it if that is to be.

        Raises RunError, with the file removed, where the step is another program's.
        """
        if not self.program:
            return
        if _program(plan.step.lower(plan.state, plan.batch)) != self.program:
            self.forget()
            where = f" It was kept in {self.file}, which was removed." if self.found else ""
            raise RunError(f"the compiled step is not the one of this run.{where} Nothing was saved: start again")
        if self.file and not self.found:
            with contextlib.suppress(Exception):  # a full disk, something that jax cannot write: the run goes on
                _write(self.file, self.step, self.program)

    def forget(self) -> None:
        """Remove the file that the step was found in."""
        if self.file and self.found:
            with contextlib.suppress(OSError):
                self.file.unlink(missing_ok=True)


def compile_step(plan: Plan, keep: bool = False) -> Compiled:
    """The step of `plan`; with `keep`, on CPUs, from disk where an earlier start kept it."""
    file = None
    if keep and _may_keep(plan):
        with contextlib.suppress(Exception):  # absent, damaged, of another jaxlib, no home: it is compiled
            file = cache_folder() / "steps" / key(plan)
            return _read(file, plan)
    lowered = plan.step.lower(plan.state, plan.batch)
    with _compiled_here() as here:
        step = lowered.compile()
    # what jax 0.10 took from its own cache it would write without its functions
    return Compiled(step, _program(lowered) if file else "", file if here else None)


def _may_keep(plan: Plan) -> bool:
    """On CPUs alone: elsewhere compiling and running take minutes."""
    devices = list(plan.mesh.devices.flat)
    return (
        jax.process_count() == 1 and devices[0].platform == "cpu" and devices == jax.devices()
        and jax.config.values["jax_enable_compilation_cache"]
    )


def key(plan: Plan) -> str:
    """Hash of everything that decides the program and what it is compiled to; also of the order of `rates`."""
    config = {name: dataclasses.asdict(getattr(plan.config, name)) for name in _SECTIONS}
    leaves = jax.tree_util.tree_leaves_with_path((plan.state, plan.batch))
    return hashlib.sha256(json.dumps({
        "code": code_digest(Path(__file__).parent),
        "releases": [sys.version, *(module.__version__ for module in (jax, jaxlib, flax, optax, np))],
        "config": {**config, "train": {key: config["train"][key] for key in config["train"] if key not in _OTHERS}},
        "steps": plan.total_steps,
        "model": repr(dataclasses.replace(plan.model, max_segments=0)),  # for cuDNN alone
        "arguments": [
            [jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(leaf.sharding)] for path, leaf in leaves
        ],
        "jax": {name: repr(value) for name, value in jax.config.values.items()},
        "environment": sorted(each for each in os.environ.items() if each[0].startswith(("XLA_", "JAX_"))),
        "machine": [platform.machine(), _processor(), [str(device) for device in jax.devices()]],
    }).encode()).hexdigest()  # fmt: skip


def _read(file: Path, plan: Plan) -> Compiled:
    with open(file, "rb") as stream:
        facts, data = os.fstat(stream.fileno()), stream.read()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o022 or hashlib.sha256(data[32:]).digest() != data[:32]:
        raise ValueError("another user may have written it, or it is damaged")
    head, executable = data[32:].split(b"\n", 1)
    about = json.loads(head)
    taken = jax.tree.structure(((plan.state, plan.batch), {}))
    given = jax.tree.structure((plan.state, dict.fromkeys(about["metrics"], 0)))
    step = serialize_executable.deserialize_and_load(executable, taken, given)
    with contextlib.suppress(OSError):
        os.utime(file)
    return Compiled(step, about["program"], file, found=True)


def _write(file: Path, step: Any, program: str) -> None:
    executable, _, given = serialize_executable.serialize(step)
    _, metrics = jax.tree.unflatten(given, [0] * given.num_leaves)
    data = json.dumps({"program": program, "metrics": sorted(metrics)}).encode() + b"\n" + executable
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent)  # for this user alone
    try:
        with open(handle, "wb") as stream:
            stream.write(hashlib.sha256(data).digest() + data)
        os.replace(temporary, file)
    finally:
        Path(temporary).unlink(missing_ok=True)
    by_age = sorted(file.parent.iterdir(), key=lambda kept: kept.stat().st_mtime)
    for kept in by_age[:-KEEP]:
        kept.unlink(missing_ok=True)


def _program(lowered: Any) -> str:
    return hashlib.sha256(lowered.as_text().encode()).hexdigest()


def _processor() -> str:
    """Model and features of the processor: code compiled for more than it has would end the process."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()


@contextlib.contextmanager
def _compiled_here() -> Iterator[list[str]]:
    """Not empty if this thread compiles something inside and does not find it in jax's cache."""
    missed: list[str] = []
    thread = threading.get_ident()

    def heard(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_misses" and threading.get_ident() == thread:
            missed.append(event)

    jax.monitoring.register_event_listener(heard)
    try:
        yield missed
    finally:
        jax.monitoring.unregister_event_listener(heard)
