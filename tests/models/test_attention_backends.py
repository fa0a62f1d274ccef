"""Every attention kernel against the XLA path, as far as a machine without its accelerator can run or lower it."""

from __future__ import annotations

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.models import attention as dispatch
from itune.models.attention import gpu, tpu, xla
from itune.sharding import make_mesh
from itune.types import InputError


def _case(batch, length, heads, kv_heads, head_dim, dtype="float32"):
    """Query, key, value, a cotangent, and segments: three of random length a row, then padding."""
    rng = np.random.default_rng(0)
    shapes = [(batch, length, n, head_dim) for n in (heads, kv_heads, kv_heads, heads)]
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    segments = np.zeros((batch, length), np.int32)
    for row in segments:
        first, second, third = np.sort(rng.choice(np.arange(1, length), 3, replace=False))
        row[:first], row[first:second], row[second:third] = 1, 2, 3
    return arrays, jnp.asarray(segments)


def _run(kernel, arrays, segments, **options):
    """Output and gradients where there is no padding."""
    query, key, value, weight = arrays
    common = {"q_segments_BL": segments, "kv_segments_BS": segments, "q_positions_BL": None, "kv_positions_BS": None}
    common |= {"offset": 0, "window": None, "scale": 0.2, "softcap": None, "mesh": None}

    def masked(query, key, value):
        return jnp.where((segments != 0)[:, :, None, None], kernel(query, key, value, **common | options), 0)

    def both(query, key, value):
        out, pullback = jax.vjp(masked, query, key, value)
        return out, *pullback(weight)

    return jax.jit(both)(query, key, value)


def _assert_equal(kernel, arrays, segments, **options):
    found, wanted = (_run(function, arrays, segments, **options) for function in (kernel, xla.attention))
    for what, a, b in zip(("output", "dquery", "dkey", "dvalue"), found, wanted):
        assert np.isfinite(a).all(), what
        np.testing.assert_allclose(a, b, atol=2e-5, err_msg=what)


@pytest.mark.parametrize(
    ("shape", "mesh", "options"),
    [
        ((1, 200, 4, 2, 80), None, {"softcap": 5.0}),  # neither length nor width a multiple of the kernel's tiles
        ((1, 256, 2, 2, 64), {"fsdp": 4, "context": 2}, {"window": 50}),
        ((4, 256, 4, 2, 64), {"fsdp": 2, "tensor": 2, "context": 2}, {}),
        ((3, 128, 4, 2, 64), {"fsdp": 2, "tensor": 4}, {}),  # rows that fsdp does not divide, shared key heads
    ],
)
def test_splash_equals_xla(shape, mesh, options):
    kernel = functools.partial(tpu.attention, block=128, interpret=True)
    _assert_equal(kernel, *_case(*shape), **options, mesh=mesh and make_mesh(mesh))


def test_splash_refuses_heads_that_the_mesh_does_not_divide():
    mesh = make_mesh({"fsdp": 2, "tensor": 4})
    with pytest.raises(InputError, match=r"mesh.tensor=4 does not divide the model's 6 query heads"):
        _run(functools.partial(tpu.attention, interpret=True), *_case(1, 128, 6, 2, 64), mesh=mesh)


def test_triton_equals_xla():
    _assert_equal(functools.partial(gpu.triton, interpret=True), *_case(1, 100, 2, 1, 32))


def test_runs_are_contiguous_segments():
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [7, 7, 7, 7, 7, 7], [1, 2, 3, 4, 5, 6]])
    starts, lengths, count = gpu.runs(segments, 4)
    assert starts.tolist() == [[0, 2, 5, -1], [0, -1, -1, -1], [0, 1, 2, 3]]
    assert lengths.tolist() == [[2, 3, 1, -1], [6, -1, -1, -1], [1, 1, 1, 1]]
    assert count.tolist() == [3, 1, 6]


@pytest.fixture
def fake_cudnn(monkeypatch):
    """cuDNN on a Hopper GPU as far as JAX's checks before lowering can see."""
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "cuda_versions", types.SimpleNamespace(cudnn_get_version=lambda: 91000))
    monkeypatch.setattr(private, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(private, "is_cuda_compute_capability_equal", lambda capability: False)
    return private


def _lowered_calls(mesh=None, **options):
    """The cuDNN calls of the program lowered for CUDA: 4 rows of 256, 8 query heads on 2 key heads of 64."""
    bf16 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((4, 256), jnp.int32)
    shapes = (bf16((4, 256, 8, 64)), bf16((4, 256, 2, 64)), bf16((4, 256, 2, 64)), segments)
    options = {"window": None, "scale": 0.125, "mesh": mesh, **options}

    def loss(query, key, value, segments):
        out = gpu.cudnn(query, key, value, q_segments_BL=segments, **options)
        return out.astype(jnp.float32).sum()

    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    return [line for line in text.splitlines() if "__cudnn$" in line]


def _types(line):
    operands, results = line.rsplit(" : (", 1)[1].split(") -> ")
    return [re.findall(r"tensor<([^>]*)>", part) for part in (operands, results)]


def test_cudnn_lowers_to_packed_calls(fake_cudnn):
    forward, backward = _lowered_calls(max_segments=6, window=100)
    kv_heads = 2 if jax.__version_info__ >= gpu.GROUPED_SINCE else 8
    query, key, bounds = "4x256x8x64xbf16", f"4x256x{kv_heads}x64xbf16", ["4x6xi32"] * 2 + ["4x7xi32"] * 2
    statistics = "24x8x256xf32"
    assert "@__cudnn$fmhaSoftmax(" in forward
    assert _types(forward) == [[query, key, key, *bounds], ["4x8x256x64xbf16", statistics, "0xui8"]]
    assert "@__cudnn$fmhaSoftmaxBackward(" in backward
    assert _types(backward)[0] == [query, key, key, statistics, query, query, *bounds]
    settings = (r"sliding_window_length\22: 100", r"max_seg_per_batch\22: 6", r"fmha_scale\22: 0.125")
    for wanted in ("PADDING_CAUSAL", *settings):
        assert wanted in forward and wanted in backward, wanted


def test_cudnn_splits_rows_and_heads_over_a_mesh(fake_cudnn):
    forward, _ = _lowered_calls(make_mesh({"data": 2, "fsdp": 2, "tensor": 2}), max_segments=6)
    assert _types(forward)[0][0] == "1x256x4x64xbf16"
    assert _types(forward)[1][1] == "6x4x256xf32"


def test_cudnn_of_one_segment_a_row_needs_no_offsets(fake_cudnn):
    forward, _ = _lowered_calls(max_segments=1)
    assert len(_types(forward)[0]) == 3 and "PADDING" not in forward


def test_cudnn_never_computes_a_row_of_too_many_segments(monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as private

    monkeypatch.setattr(private, "dot_product_attention", lambda query, key, value, **_: query)
    query = jnp.ones((2, 8, 2, 8), jnp.bfloat16)
    segments = jnp.asarray([[1, 1, 2, 2, 3, 3, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]])
    out = gpu.cudnn(query, query, query, q_segments_BL=segments, window=None, scale=1.0, max_segments=4)
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def _ignores_segments(query, key, value, *, q_segments_BL, kv_segments_BS, **options):
    ones = jnp.ones_like(q_segments_BL)
    return xla.attention(query, key, value, q_segments_BL=ones, kv_segments_BS=ones, **options)


def _confuses_groups(query, key, value, **options):
    group = query.shape[2] // key.shape[2]
    return xla.attention(query, *(jnp.tile(x, (1, 1, group, 1)) for x in (key, value)), **options)


@pytest.mark.parametrize(
    ("kernel", "verdict"),
    [(xla.attention, ""), (_ignores_segments, "output is off by"), (_confuses_groups, "output is off by")],
)
def test_self_check_tells_right_from_wrong_even_while_tracing(monkeypatch, kernel, verdict):
    monkeypatch.setattr(gpu, "cudnn", kernel)
    gpu.self_check.cache_clear()
    said = []
    jax.jit(lambda x: said.append(gpu.self_check("cudnn", 2, 16, False, "bfloat16")) or x)(1)
    gpu.self_check.cache_clear()
    assert said[0] == "" if not verdict else verdict in said[0]


def test_self_check_runs_a_pallas_kernel_while_tracing(monkeypatch):
    # under jax.ensure_compile_time_eval a Pallas kernel cannot be traced: on a GPU both kernels were found unusable
    monkeypatch.setattr(gpu, "triton", functools.partial(gpu.triton, interpret=True))
    gpu.self_check.cache_clear()
    said = []
    jax.jit(lambda x: said.append(gpu.self_check("pallas", 2, 16, False, "float32")) or x)(1)
    gpu.self_check.cache_clear()
    assert said == [""]


def _choose(backend, platform, dtype="bfloat16", length=256, head_dim=64, context=1, **options):
    mesh = types.SimpleNamespace(
        devices=np.array([types.SimpleNamespace(platform=platform)]), shape={"context": context, "tensor": 1}
    )
    query, key = (jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype) for heads in (4, 2))
    return dispatch.choose_backend(backend, query, key, mesh=mesh, **options)


def test_auto_goes_by_the_devices_of_the_mesh(monkeypatch):
    monkeypatch.setattr(gpu, "self_check", lambda *_: "")
    assert _choose("auto", "cpu") == _choose("auto", "cpu", window=64) == "blocks"
    assert _choose("auto", "cpu", length=200) == _choose("auto", "cpu", whole_rows=False) == "xla"
    assert _choose("auto", "tpu") == "splash"
    assert _choose("auto", "tpu", length=64) == "xla"
    assert _choose("auto", "tpu", dtype="float32") == "xla"
    assert _choose("auto", "tpu", whole_rows=False) == _choose("splash", "tpu", whole_rows=False) == "xla"
    assert _choose("auto", "gpu") == _choose("auto", "gpu", window=64) == "cudnn"
    assert _choose("auto", "gpu", head_dim=100) == "pallas"
    assert _choose("auto", "gpu", softcap=30.0) == _choose("auto", "gpu", context=2) == "xla"
    assert dispatch.choose_backend("auto", *[jax.ShapeDtypeStruct((1, 256, 2, 64), "bfloat16")] * 2) == "blocks"


def test_a_kernel_that_fails_its_check_is_replaced_with_a_warning(monkeypatch, caplog):
    monkeypatch.setattr(gpu, "self_check", lambda *_: "self-check failed: output is off by 1.2")
    dispatch._say_once.cache_clear()
    assert _choose("auto", "gpu") == _choose("auto", "gpu") == "xla"
    assert len(caplog.records) == 1
    assert "output is off by 1.2" in caplog.text and "costs time" in caplog.text
    with pytest.raises(InputError, match=r"model.attention=cudnn cannot run here: self-check.*choose auto or xla"):
        _choose("cudnn", "gpu")


@pytest.mark.parametrize(
    ("backend", "platform", "message"),
    [
        ("splash", "cpu", "it needs a TPU, the devices are CPU"),
        ("cudnn", "tpu", "it needs a GPU, the devices are TPU"),
        ("flash", "cpu", "'flash' is unknown; choose one of auto, xla, blocks, splash, cudnn, pallas"),
    ],
)
def test_a_backend_that_cannot_run_is_refused(backend, platform, message):
    with pytest.raises(InputError, match=re.escape(message)):
        _choose(backend, platform)
