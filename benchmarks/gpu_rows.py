"""The rows of benchmarks/gpu.py that itune runs. Each returns the values of its line."""

from __future__ import annotations

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from benchmarks.gpu import milliseconds
from benchmarks.gpu_compiled import compile_training
from itune.data.loader import build_batch
from itune.flops import peak_flops
from itune.models import Model, ModelConfig
from itune.models.architecture import Experts, LayerKind, Rope
from itune.models.lora import Lora
from itune.objectives.losses import chunked_cross_entropy
from itune.plan.chips import parse_topology
from itune.plan.compile import compile_lowered, slice_devices
from itune.sharding import make_mesh
from itune.types import Batch
from scripts.gpu_check import measure_training, packed_batches

LLAMA3 = Rope(base=5e5, scaling="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=8192)
SIZES = {
    "1b": {"width": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "head_dim": 64, "mlp_width": 8192,
           "vocab_size": 128256, "tie_embeddings": True},
    "8b": {"width": 4096, "num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128, "mlp_width": 14336,
           "vocab_size": 128256, "tie_embeddings": False},
    # six layers of Qwen3-30B-A3B
    "experts": {"width": 2048, "num_layers": 6, "num_heads": 32, "num_kv_heads": 4, "head_dim": 128, "mlp_width": 6144,
                "vocab_size": 151936, "tie_embeddings": False, "experts": Experts(128, 8, 768, normalise=True)},
    "tiny_experts": {"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_width": 128,
                     "vocab_size": 512, "tie_embeddings": False, "experts": Experts(8, 2, 32, normalise=True)},
    "tiny": {"width": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mlp_width": 128,
             "vocab_size": 512, "tie_embeddings": False},
}  # fmt: skip


def llama(size: str, mesh: Any, **settings: Any) -> Model:
    """A Llama by its published sizes, or with experts in every layer, computing in bfloat16."""
    sizes = {**SIZES[size]}
    kind = LayerKind(rope=LLAMA3, experts=sizes.pop("experts", None))
    config = ModelConfig(kinds=(kind,) * sizes["num_layers"], max_length=131072, **sizes)
    return Model(config, "llama", compute_dtype="bfloat16", mesh=mesh, **settings)


def whole_batches(count: int, rows: int, length: int, vocab: int) -> list[Batch]:
    """Batches of rows that are one example each, every token of it supervised."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, vocab, count * rows * length, dtype=np.int32)
    offsets = np.arange(count * rows + 1) * length
    store = types.SimpleNamespace(
        tokens=tokens, weights=np.ones(tokens.size, np.float32), offsets=offsets, lengths=np.diff(offsets)
    )
    return [build_batch(store, [np.array([i * rows + r]) for r in range(rows)], rows, length) for i in range(count)]


def conversations(count: int, rows: int, length: int, vocab: int) -> tuple[list[Batch], int]:
    """Packed batches with 8 to 32 conversations in a row of 4,096 tokens, and the most runs in a row."""
    return packed_batches(count, rows, length, vocab, median=170, spread=0.5)


def gemm(tiny: bool, size: int = 8192) -> dict[str, Any]:
    size = 256 if tiny else size
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: functools.reduce(lambda x, _: (x @ b) * 0.01, range(10), a))
    took = milliseconds(lambda: product(a, b), jax.block_until_ready) / 10
    device = jax.devices()[0]
    rate = 2 * size**3 / took / 1e9
    peak = peak_flops(device.device_kind)
    return {"device": device.device_kind, "jax": jax.__version__, "size": size, "milliseconds": took,
            "tflops_per_second": rate, "of_peak": rate * 1e12 / peak if peak else None}  # fmt: skip


def attention(tiny: bool) -> list[dict[str, Any]]:
    """The check of scripts/gpu_check.py on rows of 4,096 in 8 and 32 segments; it prints its own lines."""
    from itune.models.attention import KERNELS
    from scripts.gpu_check import check_attention, failures

    for segments in (4,) if tiny else (1, 8, 32):
        shape = (1, 128, 4, 2, 16) if tiny else (2, 4096, 32, 8, 128)
        check_attention(shape, None, segments, KERNELS["gpu"][:1] if jax.default_backend() == "gpu" else ())
    if failures:
        raise SystemExit(f"attention: {failures}")
    return []


def cross_entropy(
    tiny: bool, chunk: int = 2048, blocks: int = 8, sizes: tuple[int, int, int] = (16384, 248320, 2048),
    compiled_for: str = "",
) -> dict[str, Any]:
    """Loss and gradients of head kernel and hidden states, as the training step calls it."""
    tokens, vocab, width = (64, 128, 32) if tiny else sizes
    logits = llama("tiny", None).head_logits

    @jax.jit
    def both(kernel_VD: Any, hidden_TD: Any, targets_T: Any, weights_T: Any) -> Any:
        def loss(kernel_VD: Any, hidden_TD: Any) -> Any:
            result = chunked_cross_entropy(
                logits, kernel_VD, hidden_TD, targets_T, weights_T, chunk=min(chunk, tokens), blocks=blocks
            )
            return result.loss_sum / tokens

        return jax.value_and_grad(loss, argnums=(0, 1))(kernel_VD, hidden_TD)

    def inputs() -> tuple[Any, ...]:
        keys = jax.random.split(jax.random.key(0), 3)
        kernel_VD = 0.02 * jax.random.normal(keys[0], (vocab, width), jnp.bfloat16)
        hidden_TD = jax.random.normal(keys[1], (tokens, width), jnp.bfloat16)
        return kernel_VD, hidden_TD, jax.random.randint(keys[2], (tokens,), 0, vocab), jnp.ones(tokens, jnp.float32)

    what = {"tokens": tokens, "vocab": vocab, "width": width, "chunk": chunk, "blocks": blocks,
            "limit_milliseconds": 137, "limit_bytes": 4e9}  # fmt: skip
    if compiled_for:
        place = SingleDeviceSharding(slice_devices(parse_topology(compiled_for))[0])
        given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in jax.eval_shape(inputs)]
        memory = compile_lowered(both.lower(*given), "the loss").memory
        return {**what, "compiled_for": compiled_for, "peak_bytes": memory.peak, "temporary_bytes": memory.temporaries}
    given = inputs()
    compiled = both.lower(*given).compile()
    took = milliseconds(lambda: compiled(*given), jax.block_until_ready)
    memory, sizes_of = jax.devices()[0].memory_stats() or {}, compiled.memory_analysis()
    return {
        **what, "milliseconds": took,
        "tflops_per_second": (6 if blocks == 1 else 8) * tokens * vocab * width / took / 1e9,
        "peak_bytes": memory.get("peak_bytes_in_use"), "temporary_bytes": sizes_of.temp_size_in_bytes,
        "argument_bytes": sizes_of.argument_size_in_bytes, "output_bytes": sizes_of.output_size_in_bytes,
    }  # fmt: skip


def full_1b(tiny: bool, packed: bool = False, **options: Any) -> dict[str, Any]:
    sizes = {"rows": 16, "length": 2048, "steps": 25, "remat": "none", **options}
    return train("tiny" if tiny else "1b", packed, **sizes)


def full_8b(tiny: bool, **options: Any) -> dict[str, Any]:
    sizes = {"rows": 2, "length": 4096, "steps": 14, "param_dtype": "bfloat16", "stochastic_rounding": True, **options}
    return train("tiny" if tiny else "8b", False, **sizes)


def lora_8b(tiny: bool, packed: bool = False, rank: int = 16, **options: Any) -> dict[str, Any]:
    sizes = {"rows": 2, "length": 4096, "steps": 14, "param_dtype": "bfloat16", **options}
    return train("tiny" if tiny else "8b", packed, lora=Lora(rank=4 if tiny else rank, alpha=32), **sizes)


def lora_8b_packed(tiny: bool, **options: Any) -> dict[str, Any]:
    return lora_8b(tiny, packed=True, **options)


def train(
    size: str, packed: bool, *, rows: int, length: int, remat: str = "dots", param_dtype: str = "float32",
    chunk: int = 8192, compiled_for: str = "", **options: Any,
) -> dict[str, Any]:
    """`measure_training`; where "dots" keeps more than the memory holds, all is recomputed, and the line says so.

    With `compiled_for`, such as "gpu:h200:1", the step is only compiled, for a GPU that need not be there.
    """
    mesh = make_mesh(devices=slice_devices(parse_topology(compiled_for)) if compiled_for else [jax.devices()[0]])
    rows, length, chunk = (2, 128, 64) if size.startswith("tiny") else (rows, length, chunk)
    vocab = SIZES[size]["vocab_size"]
    batches, most = conversations(2, rows, length, vocab) if packed else (whole_batches(2, rows, length, vocab), 1)
    model = llama(size, mesh, remat=remat, max_segments=most, param_dtype=param_dtype)
    segments = [int(row.max()) for batch in batches for row in batch.segment_ids_BL]
    if compiled_for:
        return compile_training(model, batches[0], mesh, compiled_for, chunk=chunk, **options)
    try:
        values = measure_training(model, batches, mesh, chunk=chunk, **options)
    except jax.errors.JaxRuntimeError as error:
        if remat != "dots" or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        model = dataclasses.replace(model, remat="full")
        values = {"dots": "did not fit", **measure_training(model, batches, mesh, chunk=chunk, **options)}
    return {**values, "segments_a_row": [min(segments), max(segments)]}
