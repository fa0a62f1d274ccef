"""Attention over a sequence that several devices share: the numbers of one device, and really divided work."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.config import OptimizerSection
from itune.models import LayerKind
from itune.models.attention import attention, context, xla
from itune.objectives import make_sft
from itune.optim import make_optimizer, make_schedule
from itune.sharding import batch_sharding, make_mesh
from itune.step import abstract_state, make_train_step
from itune.types import Batch

QUICK = {"xla_backend_optimization_level": 0}  # compiling takes most of the time here
SINKS = np.array([0.5, -1.0, 3.0, 0.0], np.float32)


def case(length, kv_heads, batch=2):
    """Query, key, value, cotangent, and segments that cross the borders of shards; padding last, in row 1 first too."""
    rng = np.random.default_rng(length)
    shapes = [(batch, length, heads, 8) for heads in (4, kv_heads, kv_heads, 4)]
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    cuts = np.sort(rng.integers(1, length, (batch, 4)), axis=1)
    segments = (np.arange(length) >= cuts[:, :, None]).sum(axis=1).astype(np.int32) + 1
    segments[segments == 5] = 0
    segments[1, : length // 9] = 0
    return arrays, segments


def run(arrays, segments, mesh, sinks, **options):
    """Output, and gradients of query, key, value and sinks, where there is no padding."""
    real = (segments != 0)[:, :, None, None]

    def masked(query, key, value, sinks):
        out = attention(
            query, key, value, q_segments_BL=segments, kv_segments_BS=segments, sinks_N=sinks, mesh=mesh, **options
        )
        return jnp.where(real, out, 0)

    def both(query, key, value, weight, sinks):
        out, pull = jax.vjp(masked, query, key, value, sinks)
        return out, *pull(weight)

    return jax.jit(both).lower(*arrays, sinks).compile(compiler_options=QUICK)(*arrays, sinks)


@pytest.mark.parametrize(
    ("shape", "length", "kv_heads", "options", "sinks"),
    [
        ({"context": 2, "fsdp": 2}, 64, 2, {}, None),  # several blocks a chunk, whose scores are recomputed
        ({"context": 4}, 36, 4, {"window": 5}, None),  # nine tokens a device cannot be halved
        ({"context": 2, "tensor": 2, "data": 2}, 40, 1, {"window": 15, "softcap": 0.7, "scale": 0.9}, SINKS),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else None,
)
def test_equals_one_device(monkeypatch, shape, length, kv_heads, options, sinks):
    mesh = make_mesh(shape, jax.devices()[: math.prod(shape.values())])
    monkeypatch.setattr(xla, "BLOCK", 8)
    monkeypatch.setattr(xla, "LONG", 64)
    arrays, segments = case(length, kv_heads, batch=3 if sinks is not None else 2)  # 3: rows that do not divide
    found, wanted = (run(arrays, segments, mesh, sinks, **options) for mesh in (mesh, None))
    for what, a, b in zip(("output", "dquery", "dkey", "dvalue", "dsinks"), found, wanted):
        if b is not None:
            np.testing.assert_allclose(a, b, atol=3e-6 * max(1, float(np.abs(b).max())), err_msg=what)


def test_every_device_computes_the_same_number_of_scores(monkeypatch):
    """The scores that each device multiplies, from the blocks that its branch is traced to."""
    counted = []
    plain = xla._block
    monkeypatch.setattr(xla, "_block", lambda *a, cut, **o: counted.append(cut) or plain(*a, cut=cut, **o))
    arrays, segments = case(1024, 2)
    jax.eval_shape(lambda *qkv: context.attention(
        *qkv, q_segments_BL=segments, kv_segments_BS=segments, mesh=make_mesh({"context": 4, "fsdp": 2}),
        window=None, scale=1.0, softcap=None,
    ), *arrays[:3])  # fmt: skip
    scores = [(q.stop - q.start) * (k.stop - k.start) for q, k in counted]
    each = [sum(scores[i : i + 2]) for i in range(0, len(scores), 2)]
    assert len(counted) == 8 and len(set(each)) == 1
    assert each[0] == 128 * (128 + 1024)  # a quarter of the half square, and half a block of 128 more


def arrays_of(text):
    """Every array shape in a compiled program: dimensions on one device."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", text)}


def test_only_keys_and_values_are_whole_on_a_device(make_model):
    """In the compiled train step no array but keys, values and numbers by token spans the whole row."""
    length, rows, mesh = 304, 2, make_mesh({"context": 2, "fsdp": 2}, jax.devices()[:4])
    model = make_model(
        mesh=mesh, num_layers=2, kinds=(LayerKind(),) * 2, num_heads=4, num_kv_heads=2, head_dim=10, width=36,
        mlp_width=28,
    )
    section = OptimizerSection()
    optimizer, schedule = make_optimizer(section, 10), make_schedule(section, 10)
    step = make_train_step(make_sft(model, chunk=16), optimizer, schedule, mesh)
    ints, floats = (
        jax.ShapeDtypeStruct((rows, length), dtype, sharding=batch_sharding(mesh)) for dtype in (np.int32, np.float32)
    )
    lowered = step.lower(abstract_state(model, optimizer, mesh), Batch(ints, ints, floats, ints, ints))
    text = lowered.compile(compiler_options=QUICK).as_text()
    assert "all-gather" in text and "conditional" in text
    whole = {shape for shape in arrays_of(text) if length in shape}
    channels = 2 * 10
    assert any(math.prod(shape) == length * channels for shape in whole), "the test looks in the wrong place"
    for shape in whole:
        # 1: by token. 20: key/value heads times their width, of one layer. The others: scores of a chunk of 76 queries
        assert math.prod(shape) / length in (1, channels, 76, 2 * 76, 4 * 76), f"a whole row on a device: {shape}"
