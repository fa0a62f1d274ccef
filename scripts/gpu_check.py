#!/usr/bin/env python3
"""Does itune run right and fast on this GPU? One JSON line a finding; exit code 1 when something is wrong.

    scripts/gpu_check.sh                     # one NVIDIA GPU, no network, under 8 minutes on an H200
    python scripts/gpu_check.py --cpu-smoke  # the same code on a tiny model, to see that it runs

1. device: what is there. 2. backend: which attention `auto` takes. 3. training: 50 steps of a random 0.5B model on
packed rows: loss, real tokens per second, MFU (formula and peak stated), memory. 4. agreement: the model's loss through
the chosen backend and through XLA. 5. attention: each kernel on packed segments, output and gradients against XLA's
dense attention in float32, and milliseconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from itune.data.loader import build_batch
from itune.data.packing import pack
from itune.feed import to_device
from itune.flops import batch_pairs, peak_flops
from itune.models import Model, ModelConfig
from itune.models.architecture import LayerKind, Rope
from itune.models.attention import BACKENDS, KERNELS, choose_backend, gpu
from itune.models.lora import Lora
from itune.objectives.sft import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.sharding import make_mesh
from itune.step import init_state, make_train_step
from itune.tuning import Tuning
from itune.types import Batch

# largest difference that passes, relative to the largest entry of the reference
TOLERANCE = {"bfloat16": 0.02, "float32": 1e-4}
FORMULA = "3 x (2 N_mat tokens + 4 heads head_dim pairs) / seconds / peak; pairs: causal, within segments, no padding"
OPTIMIZER = {
    "name": "adamw", "learning_rate": 1e-4, "schedule": "constant", "warmup": 0.0, "weight_decay": 0.0,
    "clip_norm": 1.0, "b1": 0.9, "b2": 0.999, "eps": 1e-8, "moment_dtype": "float32", "options": {},
}  # fmt: skip
failures: list[str] = []


def say(check: str, **values: Any) -> None:
    print(json.dumps({"check": check, **values}), flush=True)


def demand(truth: Any, what: str) -> bool:
    if not truth:
        failures.append(what)
    return bool(truth)


def segments_of(rows: int, length: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` segments of random lengths a row, then 5 % padding, (rows, length) int32."""
    used = length - length // 20
    cuts = [np.sort(rng.choice(np.arange(1, used), count - 1, replace=False)) for _ in range(rows)]
    lengths = [np.diff(np.r_[0, cut, used, length]) for cut in cuts]
    return np.asarray([np.repeat(np.r_[1 : count + 1, 0], row) for row in lengths], np.int32)


def dense(query, key, value, *, q_segments_BL, window, scale, **_):
    """Attention with the whole square of scores, float32."""
    group = query.shape[2] // key.shape[2]
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    key, value = jnp.repeat(key, group, axis=2), jnp.repeat(value, group, axis=2)
    scores = scale * jnp.einsum("blnh,bsnh->bnls", query, key, precision="highest")
    distance = jnp.arange(query.shape[1])[:, None] - jnp.arange(query.shape[1])
    visible = (q_segments_BL[:, :, None] == q_segments_BL[:, None]) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnls,bsnh->blnh", weights, value, precision="highest")


def differentiated(function: Any, options: dict[str, Any], compiler_options: dict[str, Any] | None = None) -> Any:
    """Jitted (query, key, value, weight, segments) -> output and gradients, with padding left out of both.

    Segments are an argument: as a constant, XLA would evaluate the whole mask while it compiles, for minutes.
    """

    def both(query, key, value, weight, segments_BL):
        def masked(query, key, value):
            out = function(query, key, value, q_segments_BL=segments_BL, kv_segments_BS=segments_BL, **options)
            return jnp.where((segments_BL != 0)[:, :, None, None], out, 0)

        out, pullback = jax.vjp(masked, query, key, value)
        return out, *pullback(weight.astype(out.dtype))

    return jax.jit(both, compiler_options=compiler_options)


def check_attention(shape: tuple[int, ...], window: int | None, segments: int, kernels: tuple[str, ...]) -> None:
    """Every backend against `dense` on one shape (B, L, N, K, H): difference and milliseconds."""
    batch, length, heads, kv_heads, head_dim = shape
    rng = np.random.default_rng(0)
    segments_BL = jnp.asarray(segments_of(batch, length, segments, rng))
    arrays = [
        jnp.asarray(rng.standard_normal((batch, length, n, head_dim), np.float32), jnp.bfloat16)
        for n in (heads, kv_heads, kv_heads, heads)
    ]
    options = {
        "q_positions_BL": None, "kv_positions_BS": None, "offset": 0, "window": window, "scale": head_dim**-0.5,
        "softcap": None, "mesh": None, "max_segments": segments + 1,
    }  # fmt: skip
    reference = differentiated(dense, options, gpu.UNTUNED)
    wanted = [np.asarray(x) for x in reference(*(x.astype(jnp.float32) for x in arrays), segments_BL)]
    for name, dtype in (*((kernel, "bfloat16") for kernel in kernels), ("xla", "float32")):
        case = {"backend": name, "shape_BLNKH": shape, "dtype": dtype, "window": window, "segments": segments}
        if reason := name != "xla" and gpu.unsupported(name, *arrays[:2], window=window, softcap=None, mesh=None):
            say("attention", **case, unsupported=reason)
            continue
        step = differentiated(BACKENDS[name], options, gpu.UNTUNED if name == "xla" else None)
        given = [*(x.astype(dtype) for x in arrays), segments_BL]
        found = [np.asarray(x.astype(jnp.float32)) for x in step(*given)]
        off = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, wanted)]
        right = demand(all(x <= TOLERANCE[dtype] for x in off), f"attention: {case} is off by {off}")
        start = time.perf_counter()
        jax.block_until_ready([step(*given) for _ in range(5)])
        milliseconds = round(200 * (time.perf_counter() - start), 3)
        differences = dict(zip(("output", "query", "key", "value"), off))
        say("attention", **case, right=right, off=differences, limit=TOLERANCE[dtype], forward_backward_ms=milliseconds)


def packed_batches(
    count: int, rows: int, length: int, vocab: int, *, median: float = 250, spread: float = 0.8
) -> tuple[list[Batch], int]:
    """Full batches of packed examples with log-normal lengths (`median` in tokens), and the most runs in a row."""
    rng = np.random.default_rng(1)
    drawn = rng.lognormal(np.log(min(median, length / 8)), spread, size=int(8 * count * rows * max(1, length / median)))
    lengths = np.clip(drawn.astype(np.int64), 8, length)
    offsets = np.r_[0, np.cumsum(lengths)]
    tokens = rng.integers(0, vocab, int(offsets[-1]), dtype=np.int32)
    weights = np.concatenate([np.arange(n) >= n // 3 for n in lengths]).astype(np.float32)
    store = types.SimpleNamespace(tokens=tokens, weights=weights, offsets=offsets, lengths=np.diff(offsets))
    members = pack(lengths, length)
    members = [members[i] for i in rng.permutation(len(members))[: count * rows]]
    batches: list[Any] = [build_batch(store, members[i : i + rows], rows, length) for i in range(0, count * rows, rows)]
    return batches, max(map(len, members)) + 1


def check_agreement(model: Model, params: Any, batch: Batch, mesh: Any) -> None:
    """The mean loss of one batch through the chosen backend and through XLA."""
    losses = {}
    for attention in ("auto", "xla"):
        per_token = make_sft(dataclasses.replace(model, attention=attention), chunk=4096).per_token
        nll_BL, _ = jax.jit(per_token, compiler_options=gpu.UNTUNED)(params, {}, to_device(batch, mesh))
        losses[attention] = float((nll_BL * batch.loss_weights_BL).sum() / batch.loss_weights_BL.sum())
    off = abs(losses["auto"] / losses["xla"] - 1)
    right = demand(off <= 2e-3, f"agreement: the loss differs by {off:.2e} between backends")
    say("agreement", right=right, losses=losses, off=off, limit=2e-3)


def check_training(model: Model, batches: list[Batch], mesh: Any, steps: int, chunk: int) -> None:
    """Train from random weights on the batches in turn, and demand finite losses that fall."""
    values = measure_training(model, batches, mesh, steps, chunk)
    right = demand(values.pop("finite"), "training: a loss or gradient norm is not finite")
    first, last = values["first_loss"], values["last_loss"]
    right &= demand(last < first, f"training: the loss went from {first:.4f} to {last:.4f}")
    say("training", right=right, **values)


def training(
    model: Model, mesh: Any, steps: int, chunk: int, *, lora: Lora | None = None, stochastic_rounding: bool = False,
    **settings: Any,
) -> tuple[Any, Any, Tuning]:
    """Training step, optimizer and what trains. `settings` are fields of the config's optimizer section."""
    section = types.SimpleNamespace(**{**OPTIMIZER, **settings})
    optimizer, schedule = make_optimizer(section, steps), make_schedule(section, steps)
    tuning = Tuning(model, lora=lora)
    objective = make_sft(model, chunk=chunk, parameters=tuning.parameters)
    step = make_train_step(objective, optimizer, schedule, mesh, stochastic_rounding=stochastic_rounding)
    return step, optimizer, tuning


def measure_training(
    model: Model, batches: list[Batch], mesh: Any, steps: int, chunk: int, *, warm_up: int = 5, **options: Any
) -> dict[str, Any]:
    """Real tokens a second, MFU and memory of the training step from random weights; the first steps, with
    compilation, are not timed. `options` are those of `training`."""
    step, optimizer, tuning = training(model, mesh, steps, chunk, **options)
    trainable, frozen = tuning.divide(lambda: model.init(jax.random.key(0)), seed=0)
    state = init_state(model, trainable, optimizer, 0, mesh, frozen=frozen or None)
    del trainable, frozen
    return time_steps(step, state, model, batches, mesh, steps, warm_up, tuning.train_flops())


def time_steps(
    step: Any, state: Any, model: Model, batches: list[Batch], mesh: Any, steps: int, warm_up: int, count_flops: Any
) -> dict[str, Any]:
    """See `measure_training`. `count_flops(config, tokens, pairs)`: FLOPs of a step that the model needs."""
    device = jax.devices()[0]
    warm_up, metrics = min(warm_up, steps // 2), []
    parameters = sum(leaf.size for leaf in jax.tree.leaves((state.trainable, state.frozen)))
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.trainable))
    on_device = [to_device(batch, mesh) for batch in batches]
    begin = time.perf_counter()
    for number in range(steps):
        if number == warm_up:
            jax.block_until_ready(state)
            compile_seconds, start = time.perf_counter() - begin, time.perf_counter()
        state, values = step(state, on_device[number % len(batches)])
        metrics.append(values)
    jax.block_until_ready(state)
    seconds = time.perf_counter() - start
    timed = [batches[number % len(batches)] for number in range(warm_up, steps)]
    counts = [int((batch.segment_ids_BL > 0).sum()) for batch in timed]
    flops = sum(count_flops(model.config, n, batch_pairs(model.config, batch)) for n, batch in zip(counts, timed))
    tokens = sum(counts)
    peak = peak_flops(device.device_kind)
    losses = [float(m["loss"]) for m in metrics]
    norms = [float(m["grad_norm"]) for m in metrics]
    memory = device.memory_stats() or {}
    return {
        "finite": bool(np.isfinite(losses + norms).all()), "parameters": parameters, "trained": trained, "steps": steps,
        "rows": len(batches[0].tokens_BL), "length": batches[0].tokens_BL.shape[1], "max_segments": model.max_segments,
        "compute_dtype": model.compute_dtype, "param_dtype": model.param_dtype, "remat": model.remat,
        "first_loss": losses[0], "last_loss": losses[-1], "grad_norm": norms[-1],
        "seconds_before_timing": round(compile_seconds, 2), "step_seconds": seconds / len(timed),
        "tokens_per_second": tokens / seconds, "padding": 1 - tokens / sum(b.tokens_BL.size for b in timed),
        "model_tflops_per_second": flops / seconds / 1e12, "mfu": flops / seconds / peak if peak else None,
        "peak_tflops": peak / 1e12 if peak else None, "formula": FORMULA,
        "peak_bytes": memory.get("peak_bytes_in_use"), "limit_bytes": memory.get("bytes_limit"),
    }  # fmt: skip


def make_model(mesh: Any, max_segments: int, tiny: bool) -> Model:
    """0.5B parameters in the proportions of Qwen3-0.6B, with a smaller vocabulary."""
    layers = 2 if tiny else 28
    config = ModelConfig(
        vocab_size=512 if tiny else 65536, width=64 if tiny else 1024, num_layers=layers, num_heads=4 if tiny else 16,
        num_kv_heads=2 if tiny else 8, head_dim=16 if tiny else 128, mlp_width=192 if tiny else 3072,
        kinds=(LayerKind(rope=Rope(base=1e6)),) * layers, max_length=4096, qk_norm=True, tie_embeddings=True,
    )  # fmt: skip
    return Model(config, "qwen3", compute_dtype="bfloat16", mesh=mesh, max_segments=max_segments)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu-smoke", action="store_true", help="tiny sizes, on CPU")
    parser.add_argument("--steps", type=int, default=0, help="training steps (50)")
    arguments = parser.parse_args()
    tiny, begin, device = arguments.cpu_smoke, time.perf_counter(), jax.devices()[0]
    say(
        "device", kind=device.device_kind, platform=device.platform, count=jax.device_count(), jax=jax.__version__,
        python=sys.version.split()[0], memory_bytes=(device.memory_stats() or {}).get("bytes_limit"),
    )  # fmt: skip
    if device.platform != "gpu" and not tiny:
        print(f"gpu_check: no NVIDIA GPU, jax sees {device.platform}; --cpu-smoke runs on a CPU", file=sys.stderr)
        return 1
    mesh = make_mesh(devices=[device])
    rows, length, vocab = (2, 128, 512) if tiny else (16, 2048, 65536)
    batches, most = packed_batches(2 if tiny else 8, rows, length, vocab)
    model = make_model(mesh, most, tiny)
    heads = (model.config.num_heads, model.config.num_kv_heads)
    inputs = [jax.ShapeDtypeStruct((rows, length, n, model.config.head_dim), jnp.bfloat16) for n in heads]
    chosen = choose_backend("auto", *inputs, mesh=mesh)
    say("backend", right=demand(tiny or chosen != "xla", "backend: auto chose plain XLA on a GPU"), chosen=chosen)
    check_training(model, batches, mesh, arguments.steps or (6 if tiny else 50), 64 if tiny else 8192)
    few = Batch(*(array[:2] for array in batches[0]))
    check_agreement(model, model.init(jax.random.key(0)), few, mesh)
    shapes = [(1, 128, 4, 2, 16)] if tiny else [(4, 2048, 16, 8, 128), (4, 2048, 14, 2, 64), (2, 4096, 32, 32, 128)]
    for shape in shapes:
        for window in (None, shape[1] // 4) if shape is shapes[0] else (None,):
            check_attention(shape, window, 3 if tiny else 12, KERNELS["gpu"] if device.platform == "gpu" else ())
    say("done", right=not failures, failures=failures, seconds=round(time.perf_counter() - begin, 1))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
