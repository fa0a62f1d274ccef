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

from itune.data.store import hash_of
from itune.setup_run import Plan
from itune.storage.cache import cache_folder, code_digest
from itune.types import RunError
from itune.writers import write_atomically

KEEP = 16  # files, the last used ones; a step of scanned layers is one or two megabytes
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
    """The step of a plan; where it may be kept, in which file and whether that is where it comes from."""

    step: Any
    file: Path | None = None
    program: str = ""  # hash of the lowered program
    lowered: Any = None  # None: the step was found

    def settle(self, plan: Plan) -> None:
        """Compare a step that was found with the program of `plan`; keep one that was compiled.

        Raises RunError, with the file removed, where the step is another program's.
        """
        if self.file and self.lowered:
            with contextlib.suppress(OSError, ValueError, NotImplementedError):  # a full disk; constants inside
                _write(self.file, self.step, _program(self.lowered))
        elif self.file and _program(_lowered(plan, self.file)) != self.program:
            self.file.unlink(missing_ok=True)
            raise RunError(
                f"the compiled step kept in {self.file} is not the one of this run; it was removed and nothing was "
                "saved: start again"
            )


def may_keep(plan: Plan) -> bool:
    """Whether `plan` is one to keep the step of: on CPUs; elsewhere to compile and to run take minutes."""
    devices = list(plan.mesh.devices.flat)
    return (
        jax.process_count() == 1 and devices[0].platform == "cpu" and devices == jax.devices()
        and jax.config.values["jax_enable_compilation_cache"]
    )


def compile_step(plan: Plan, keep: bool = False) -> Compiled:
    """The step of `plan`, with `keep` from disk where an earlier start kept it."""
    file = cache_folder() / "steps" / key(plan) if keep and may_keep(plan) else None
    if file:
        with contextlib.suppress(Exception):  # absent, damaged, of another jaxlib: it is compiled again
            return _read(file, plan)
    lowered = _lowered(plan, file)
    with _found_compiled() as found:
        step = lowered.compile()
    return Compiled(step, None if found else file, lowered=lowered)


def _lowered(plan: Plan, file: Path | None) -> Any:
    """The program; one to keep has a name that jax's cache only has after this very key was compiled.

    For what jax 0.10 read from its cache it cannot write: its functions are left out.
    """
    return (plan.step.named(file.name[:8]) if file else plan.step).lower(plan.state, plan.batch)


def key(plan: Plan) -> str:
    """Hash of everything that decides the program and what it is compiled to."""
    sections = ("model", "train", "optimizer", "loss", "lora", "mesh")
    leaves = jax.tree_util.tree_leaves_with_path((plan.state, plan.batch))
    return hash_of({
        "code": code_digest(Path(__file__).parent),
        "releases": [sys.version, *(module.__version__ for module in (jax, jaxlib, flax, optax, np))],
        "config": {name: dataclasses.asdict(getattr(plan.config, name)) for name in sections},
        "steps": plan.total_steps,
        "model": repr(dataclasses.replace(plan.model, max_segments=0)),  # for cuDNN alone
        "arguments": [
            [jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), str(leaf.sharding)] for path, leaf in leaves
        ],
        "jax": {name: repr(value) for name, value in jax.config.values.items()},
        "environment": {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "JAX_"))},
        "machine": [platform.machine(), _processor(), [str(device) for device in jax.devices()]],
    })  # fmt: skip


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
    os.utime(file)
    return Compiled(step, file, about["program"])


def _write(file: Path, step: Any, program: str) -> None:
    executable, _, given = serialize_executable.serialize(step)
    _, metrics = jax.tree.unflatten(given, [0] * given.num_leaves)
    data = json.dumps({"program": program, "metrics": sorted(metrics)}).encode() + b"\n" + executable
    write_atomically(file, hashlib.sha256(data).digest() + data)
    file.chmod(0o600)
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
def _found_compiled() -> Iterator[list[str]]:
    """What this thread took from jax's cache inside."""
    taken: list[str] = []
    thread = threading.get_ident()

    def heard(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits" and threading.get_ident() == thread:
            taken.append(event)

    jax.monitoring.register_event_listener(heard)
    try:
        yield taken
    finally:
        jax.monitoring.unregister_event_listener(heard)
