"""Start of a job of several processes, and the one fact they must agree on while they run."""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itune.runtime.libtpu import tpu_here
from itune.runtime.supervisor import heartbeat_seconds
from itune.types import InputError

_VARIABLES = ("ITUNE_COORDINATOR", "ITUNE_NUM_PROCESSES", "ITUNE_PROCESS_ID")


def start() -> None:
    """Join the job that the environment describes; alone when it describes none. Call before anything uses a device.

    - ITUNE_COORDINATOR=host:port with ITUNE_NUM_PROCESSES and ITUNE_PROCESS_ID: exactly that. The coordinator listens
      on the given address only.
    - a SLURM step or an Open MPI job of several tasks, a TPU pod, or ITUNE_DISTRIBUTED=1: as jax finds it.
    - ITUNE_DISTRIBUTED=0: alone, whatever the machine looks like.
    """
    if jax.distributed.is_initialized():
        return
    asked = os.environ.get("ITUNE_DISTRIBUTED", "")
    if any(name in os.environ for name in _VARIABLES):
        address, count, index = _given()
        jax.distributed.initialize(
            address, count, index, coordinator_bind_address=address if index == 0 else None,
            heartbeat_timeout_seconds=heartbeat_seconds(),
        )
    elif asked == "1" or (asked != "0" and (_several_tasks() or tpu_here())):
        _as_jax_finds_it(must=asked == "1" or _several_tasks())


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """`start`, and of a job of several processes the first alone prints: for verbs that every process runs alike."""
    start()
    with contextlib.redirect_stdout(io.StringIO()) if jax.process_index() else contextlib.nullcontext():
        yield


def _as_jax_finds_it(must: bool) -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds())
    except ValueError as error:  # jax found no job: one TPU machine, or none at all
        if must:
            raise InputError(f"environment: several processes are announced, but jax finds no job: {error}") from error


def _given() -> tuple[str, int, int]:
    missing = [name for name in _VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(f"environment: {', '.join(missing)} not set; the three of {', '.join(_VARIABLES)} go together")
    address, count, index = (os.environ[name] for name in _VARIABLES)
    if ":" not in address or not address.rsplit(":", 1)[1].isdecimal():
        raise InputError(f"environment: ITUNE_COORDINATOR must be host:port, found {address!r}")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise InputError(
            f"environment: ITUNE_PROCESS_ID must be a number below ITUNE_NUM_PROCESSES, found {index!r} of {count!r}"
        )
    return address, int(count), int(index)


def _several_tasks() -> bool:
    """Whether a launcher says that this process is one of several."""
    counts = (os.environ.get("SLURM_STEP_NUM_TASKS", ""), os.environ.get("OMPI_COMM_WORLD_SIZE", ""))
    return any(count.isdecimal() and int(count) > 1 for count in counts)


_meetings = itertools.count()


def meet(reason: str, timeout: int = 3600) -> None:
    """Wait until every process of the job is here too; all must come to the same meetings. `timeout` in seconds.

    Goes through jax's coordinator, not through devices: the collectives of a CPU job give up after 30 seconds, and one
    process may compile for longer than that after another is done.
    """
    if jax.process_count() > 1:
        from orbax.checkpoint import v1 as ocp

        everyone = set(range(jax.process_count()))
        key = f"{reason} {next(_meetings)}"
        asyncio.run(ocp.multihost.sync_global_processes(key, operation_id="itune", timeout=timeout, processes=everyone))


def hosts() -> list[str]:
    """The name of every process's host, by process. All processes must call it."""
    from jax.experimental import multihost_utils

    own = np.frombuffer(socket.gethostname().encode()[:64].ljust(64, b"\0"), np.uint8)
    names_P64 = np.asarray(multihost_utils.process_allgather(own)).reshape(-1, 64)
    return [name.tobytes().rstrip(b"\0").decode(errors="replace") for name in names_P64]


def share_a_folder(folder: Path) -> bool:
    """Whether every process sees the same folder, which each has made. All processes must call it."""
    if jax.process_count() == 1:
        return True
    from jax.experimental import multihost_utils

    meet("folder made")
    token = int(multihost_utils.broadcast_one_to_all(np.int32(random.SystemRandom().getrandbits(31))))
    path = folder / f".shared-{token}"
    if jax.process_index() == 0:
        path.touch()
    meet("token written")
    seen = bool(np.asarray(multihost_utils.process_allgather(np.int32(path.exists()))).all())
    if jax.process_index() == 0:
        path.unlink()
    return seen


class Agreement:
    """A flag that any process may raise and that all see at the same step.

    Each step every process contributes its own flag to a maximum over all devices; the answer is read one step later,
    when it has long been computed. A signal handler of ours and jax's own preemption service disable each other, so
    this is the flag that stops a job. One process alone needs no exchange.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._alone = jax.process_count() == 1
        self._pending: Any = None
        if not self._alone:
            every_device = PartitionSpec(tuple(mesh.axis_names))
            self._sharding = NamedSharding(mesh, every_device)
            self._max = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))

    def exchange(self, flag: int) -> int:
        """Contribute `flag`; return the highest that any process had raised at the previous call."""
        if self._alone:
            return flag
        previous = self._pending
        shape = (self._sharding.mesh.size,)
        flags = jax.make_array_from_callback(
            shape, self._sharding, lambda index: np.full(shape, flag, np.int32)[index]
        )
        self._pending = self._max(flags)
        return 0 if previous is None else int(previous)
