"""Attention in blocks on CPU against the plain product: values and gradients of packed rows, windows, softcaps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.models.attention import attention, choose_backend, cpu
from itune.models.remat import POLICIES
from itune.sharding import make_mesh

CASES = {
    "packed": {"length": 300},
    "grouped, whole blocks": {"length": 256, "heads": 4, "kv_heads": 2},
    "window": {"length": 400, "window": 70},
    "window over blocks": {"length": 400, "window": 200, "softcap": 3.0},
    "softcap": {"length": 260, "softcap": 2.0, "kv_heads": 1},
    "one segment": {"length": 384, "cuts": ()},
}


def inputs(length, heads=4, kv_heads=4, cuts=(0.1, 0.35, 0.5, 0.93), seed=0, rows=3, head_dim=8):
    """Packed rows, each cut at other places, the last segment of two of them padding."""
    rng = np.random.default_rng(seed)
    segments = np.ones((rows, length), np.int32)
    for row in range(rows):
        for number, cut in enumerate(cuts, 2):
            segments[row, int(cut * length) + 7 * row :] = number
        if cuts and row:
            segments[row, int(cuts[-1] * length) + 7 * row :] = 0
    query, key, value, out = (
        rng.normal(size=(rows, length, count, head_dim)).astype(np.float32)
        for count in (heads, kv_heads, kv_heads, heads)
    )
    return query, key, value, segments, out * (segments > 0)[..., None, None]  # nothing reads the output of padding


def run(backend, query, key, value, segments, out, **options):
    def loss(query, key, value):
        mixed = attention(
            query, key, value, q_segments_BL=segments, kv_segments_BS=segments, backend=backend, **options
        )
        return jnp.sum(mixed * out), mixed

    gradients, mixed = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(query, key, value)
    return np.where((segments > 0)[..., None, None], mixed, 0), *gradients


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_product(case):
    settings = dict(CASES[case])
    options = {name: settings.pop(name) for name in ("window", "softcap") if name in settings}
    given = inputs(**settings)
    for ours, wanted in zip(run("blocks", *given, **options), run("xla", *given, **options), strict=True):
        np.testing.assert_allclose(ours, wanted, atol=2e-5, rtol=1e-5)


def test_bfloat16_stays_near():
    query, key, value, segments, out = inputs(300)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in (query, key, value)]
    for ours, wanted in zip(run("blocks", *narrow, segments, out), run("xla", *narrow, segments, out), strict=True):
        assert ours.dtype == wanted.dtype
        difference = np.asarray(ours, np.float32) - np.asarray(wanted, np.float32)
        assert np.linalg.norm(difference) < 2e-2 * np.linalg.norm(np.asarray(wanted, np.float32))


def test_reads_only_blocks_that_share_a_segment():
    block = cpu.BLOCK
    segments = np.repeat(np.arange(1, 9), block)[None]  # eight blocks, each a segment of its own
    static = cpu._Static(8, 1, None, 1.0, None)
    assert cpu._first_blocks(static, segments.reshape(8, block)).tolist() == list(range(8))
    whole = np.ones((8, block), np.int32)
    assert cpu._first_blocks(static, whole).tolist() == [0] * 8
    window = block + block // 2 + 4  # the first query of a block reaches into the second block before it
    assert cpu._first_blocks(static._replace(window=window), whole).tolist() == [0, 0, 0, 1, 2, 3, 4, 5]
    padded = whole.copy()
    padded[5:] = 0
    assert cpu._first_blocks(static, padded).tolist() == [0] * 5 + [5, 6, 7]


def test_no_number_of_another_segment_gets_in():
    """Keys that a query may not see do not matter, not even infinite ones in blocks that are skipped."""
    query, key, value, segments, _ = inputs(512, cuts=(0.5,), rows=1)
    spoiled = value.copy()
    spoiled[:, :256] = np.nan
    run_it = functools.partial(attention, q_segments_BL=segments, kv_segments_BS=segments, backend="blocks")
    np.testing.assert_array_equal(run_it(query, key, value)[:, 256:], run_it(query, key, spoiled)[:, 256:])


def test_chosen_on_one_cpu_device_for_whole_long_rows():
    query = jax.ShapeDtypeStruct((2, 512, 4, 8), jnp.float32)
    assert choose_backend("auto", query, query) == "blocks"
    assert choose_backend("auto", query, query, whole_rows=False) == "xla"
    assert choose_backend("auto", query, query, sinks=True) == "xla"
    assert choose_backend("auto", query, query, mesh=make_mesh({"fsdp": 8})) == "xla"
    short = jax.ShapeDtypeStruct((2, 200, 4, 8), jnp.float32)
    assert choose_backend("auto", short, short) == "xla"


def test_dots_spares_the_second_forward_pass():
    query, key, value, segments, out = inputs(length=300)

    def layer(scale):
        given = {"q_segments_BL": segments, "kv_segments_BS": segments, "backend": "blocks"}
        return jnp.sum(jnp.tanh(attention(scale * query, scale * key, scale * value, **given)) * out)

    def products(layer):
        return str(jax.make_jaxpr(jax.grad(layer))(1.0)).count("dot_general")

    found = {name: products(jax.checkpoint(layer, policy=policy)) for name, policy in POLICIES.items()}
    assert products(layer) == found["dots"] == found["full"] - 2
