"""How long training stands still while a checkpoint of 600 MB is saved."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from benchmarks.row import Bound, Row, cpu_seconds

PARAMETERS = 50_000_000  # three float32 arrays of each: 600 MB


def itune(folder: Path) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp

    from itune.checkpoint import Store
    from itune.sharding import make_mesh, replicated
    from itune.types import TrainState

    mesh = make_mesh({"fsdp": 1})

    def tree(value: float) -> dict[str, Any]:
        return {f"layer_{i}": jnp.full((PARAMETERS // 10,), value, jnp.float32) for i in range(10)}

    state = TrainState(jnp.zeros((), jnp.int32), tree(1.0), {}, {"mu": tree(2.0), "nu": tree(3.0)},
                       jax.random.key_data(jax.random.key(0)))  # fmt: skip
    state = jax.device_put(state, replicated(mesh))
    jax.block_until_ready(state)
    store = Store(folder / "checkpoints", log=lambda _: None)
    store.open()
    stalls, totals = [], []
    for step in (1, 2, 3):
        begun = time.perf_counter()
        store.save(step, state, data={}, config={})
        stalls.append(time.perf_counter() - begun)
        store.wait()
        totals.append(time.perf_counter() - begun)
    store.close()
    shutil.rmtree(folder / "checkpoints")
    return {"stall_seconds": stalls[-1], "until_safe_seconds": totals[-1], "first_stall_seconds": stalls[0]}


def torch_save(folder: Path) -> dict[str, Any]:
    import torch

    state = {f"{name}{i}": torch.full((PARAMETERS // 10,), 1.0) for name in "pmv" for i in range(10)}
    seconds = []
    for step in (1, 2, 3):
        begun = time.perf_counter()
        torch.save(state, folder / f"{step}.pt")
        seconds.append(time.perf_counter() - begun)
        (folder / f"{step}.pt").unlink()
    return {"stall_seconds": seconds[-1], "until_safe_seconds": seconds[-1], "first_stall_seconds": seconds[0],
            "cpu_seconds": cpu_seconds()}  # fmt: skip


ROW = Row(
    title="Stall of the training loop while 600 MB of parameters and moments are saved, the third save of a process.",
    note="itune's checkpoint also holds a hash of every file; until_safe is when the whole is on disk and committed.",
    sides={"itune": itune, "torch_save": torch_save},
    bounds=(Bound("stall_seconds", at_most=0.1),),
)
