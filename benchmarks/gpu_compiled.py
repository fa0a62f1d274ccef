"""The training rows of benchmarks/gpu.py, compiled only, for a GPU that need not be there."""

from __future__ import annotations

from typing import Any

import jax

from itune.models import Model
from itune.plan.chips import parse_topology
from itune.plan.compile import compile_step
from itune.plan.gpu_target import cudnn_memory
from itune.sharding import batch_sharding
from itune.step import abstract_state
from itune.types import Batch
from scripts.gpu_check import training


def compile_training(
    model: Model, batch: Batch, mesh: Any, where: str, *, chunk: int, steps: int, warm_up: int = 0, **options: Any
) -> dict[str, Any]:
    """What the compiler says that the step of `measure_training` needs, and the attention that it runs."""
    del warm_up
    step, optimizer, tuning = training(model, mesh, steps, chunk, **options)
    trainable, frozen = tuning.abstract()
    state = abstract_state(model, optimizer, mesh, trainable=trainable, frozen=frozen or None)
    shapes = (jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=batch_sharding(mesh)) for leaf in batch)
    program = compile_step(step, state, Batch(*shapes))
    attention = cudnn_memory(program.text)
    return {
        "compiled_for": where, "rows": len(batch.tokens_BL), "length": batch.tokens_BL.shape[1],
        "max_segments": model.max_segments, "remat": model.remat, "kernel": "cudnn" if attention else "another",
        "compiled_bytes": program.memory.peak, "cudnn_bytes": attention,
        "peak_bytes": program.memory.peak + attention, "limit_bytes": parse_topology(where).chip.memory,
        "state_copied_bytes": program.memory.outputs - program.memory.aliased, "compile_seconds": program.seconds,
    }  # fmt: skip
