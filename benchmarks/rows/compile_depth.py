"""Compile time of the training step at 32 layers over that at 2: layers are scanned, so it should not grow."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from benchmarks.row import Bound, Clock, Row


def compiled(folder: Path, layers: int) -> dict[str, Any]:
    import jax

    from benchmarks import inputs, ours

    jax.config.update("jax_enable_compilation_cache", False)
    width, mlp, _, heads, vocab = inputs.SIZES["15m"]
    from itune.models import LayerKind, Model, ModelConfig
    from itune.objectives import make_sft
    from itune.optim import make_optimizer, make_schedule
    from itune.sharding import batch_sharding, make_mesh
    from itune.step import abstract_state, make_train_step
    from itune.types import Batch

    mesh = make_mesh({"fsdp": 1})
    config = ModelConfig(vocab, width, layers, heads, heads, width // heads, mlp, (LayerKind(),) * layers,
                         max_length=512, tie_embeddings=True)  # fmt: skip
    model, section = Model(config, "llama", mesh=mesh), ours.config_of(folder).optimizer
    optimizer = make_optimizer(section, 10)
    step = make_train_step(make_sft(model), optimizer, make_schedule(section, 10), mesh)
    types = ["float32" if name == "loss_weights_BL" else "int32" for name in Batch._fields]
    batch = Batch(*(jax.ShapeDtypeStruct((4, 512), dtype, sharding=batch_sharding(mesh)) for dtype in types))
    state = abstract_state(model, optimizer, mesh)
    clock = Clock()
    step.lower(state, batch).compile()
    wall, cpu = clock.read()
    return {"seconds": wall, "cpu_seconds": cpu}


ROW = Row(
    title="Tracing and compiling the training step, 32 layers against 2, no cache.",
    sides={"layers_32": functools.partial(compiled, layers=32), "layers_2": functools.partial(compiled, layers=2)},
    bounds=(Bound("seconds", at_most=1.1, busy="cpu_seconds"),),
)
