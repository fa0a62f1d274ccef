"""The XLA backend against a plain double-precision definition: segments, window, softcap, heads, blocks, offsets."""

from __future__ import annotations

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from itune.models.attention import attention
from itune.models.attention.xla import BLOCK, LONG, MAX_BLOCKS, _blocks
from itune.types import InputError


def reference(
    query,
    key,
    value,
    q_segments,
    kv_segments,
    *,
    offset=0,
    window=None,
    softcap=None,
    scale=None,
    positions=None,
    sinks_N=None,
):
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = query.shape
    out = np.zeros(query.shape)
    group = heads // key.shape[2]
    for b in range(batch):
        for i in range(length):
            seen = []
            for s in range(key.shape[1]):
                distance = offset + i - s if positions is None else positions[0][b, i] - positions[1][b, s]
                same = q_segments[b, i] == kv_segments[b, s] != 0
                if same and s <= offset + i and (window is None or distance < window):
                    seen.append(s)
            if not seen:
                continue
            for n in range(heads):
                scores = key[b, seen, n // group] @ query[b, i, n] * (scale or head_dim**-0.5)
                scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                sink = 0 if sinks_N is None else np.exp(sinks_N[n] - scores.max())
                out[b, i, n] = weights / (weights.sum() + sink) @ value[b, seen, n // group]
    return out


def inputs(length, slots=None, heads=4, kv_heads=2, head_dim=8, seed=0, batch=2):
    rng = np.random.default_rng(seed)
    slots = slots or length
    shapes = [(batch, length, heads, head_dim)] + [(batch, slots, kv_heads, head_dim)] * 2
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def ragged(length, seed=0, batch=2):
    """Segments of random lengths with padding at the end, and in row 1 at the start too."""
    rng = np.random.default_rng(seed)
    cuts = np.sort(rng.integers(1, length, (batch, 4)), axis=1)
    segments = (np.arange(length) >= cuts[:, :, None]).sum(axis=1).astype(np.int32) + 1
    segments[segments == 5] = 0
    segments[1, : length // 8] = 0
    return segments


@pytest.mark.parametrize(
    ("options", "kv_heads"),
    [({}, 1), ({"window": 3}, 2), ({"window": 1}, 4), ({"softcap": 0.7}, 2), ({"scale": 0.9, "window": 200}, 2)]
    + [({"sinks_N": np.array([0.5, -1.0, 3.0, 0.0], np.float32), "window": 6}, 2)],
)
def test_equals_the_definition(options, kv_heads):
    query, key, value = inputs(40, kv_heads=kv_heads)
    segments = ragged(40)
    run = jax.jit(functools.partial(attention, **options))
    ours = np.asarray(run(query, key, value, q_segments_BL=segments, kv_segments_BS=segments))
    theirs = reference(query, key, value, segments, segments, **options)
    np.testing.assert_allclose(ours[segments != 0], theirs[segments != 0], atol=2e-6)
    assert np.isfinite(ours).all()


@pytest.mark.parametrize("window", [None, 50])
def test_blocks_equal_the_definition(window):
    length = 2 * BLOCK + 17
    query, key, value = inputs(length, heads=1, kv_heads=1, batch=2)
    segments = ragged(length)
    run = jax.jit(functools.partial(attention, window=window))
    ours = np.asarray(run(query, key, value, q_segments_BL=segments, kv_segments_BS=segments))
    theirs = reference(query, key, value, segments, segments, window=window)
    np.testing.assert_allclose(ours[segments != 0], theirs[segments != 0], atol=2e-6)


@pytest.mark.parametrize("options", [{}, {"window": 4}])
def test_offset_into_a_cache(options):
    query, key, value = inputs(3, slots=20)
    kv_segments = ragged(20)
    kv_segments[:, 7:10] = 2
    q_positions, kv_positions = np.array([[7, 8, 9]] * 2) + 5, np.array([np.arange(20) * 2] * 2)
    run = jax.jit(functools.partial(attention, **options))
    ours = run(query, key, value, q_segments_BL=kv_segments[:, 7:10], kv_segments_BS=kv_segments, offset=jnp.int32(7))
    theirs = reference(query, key, value, kv_segments[:, 7:10], kv_segments, offset=7, **options)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
    if options:  # given positions, the window counts those and not slots
        ours = run(
            query,
            key,
            value,
            q_segments_BL=kv_segments[:, 7:10],
            kv_segments_BS=kv_segments,
            q_positions_BL=q_positions,
            kv_positions_BS=kv_positions,
            offset=jnp.int32(7),
        )
        theirs = reference(
            query,
            key,
            value,
            kv_segments[:, 7:10],
            kv_segments,
            offset=7,
            positions=(q_positions, kv_positions),
            **options,
        )
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_a_row_without_keys_is_finite_in_value_and_gradient():
    query, key, value = inputs(12)
    segments = np.zeros((2, 12), np.int32)

    def total(*qkv):
        return attention(*qkv, q_segments_BL=segments, kv_segments_BS=segments, backend="xla").sum()

    assert np.isfinite(total(query, key, value))
    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(total, (0, 1, 2)))(query, key, value))


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    query, key, value = (jnp.asarray(x, jnp.bfloat16) for x in inputs(64))
    segments = ragged(64)
    ours = attention(query, key, value, q_segments_BL=segments, kv_segments_BS=segments)
    assert ours.dtype == jnp.bfloat16
    theirs = reference(query, key, value, segments, segments)
    np.testing.assert_allclose(np.asarray(ours, np.float32)[segments != 0], theirs[segments != 0], atol=0.02)


def largest(jaxpr) -> int:
    """Elements of the largest array in a jaxpr, inner ones included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [math.prod(v.aval.shape) for v in equation.outvars]
        for parameter in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest(inner))
    return max(sizes)


def test_long_rows_never_build_the_square_and_do_not_keep_it_either():
    length = 4096
    query, key, value = (jnp.zeros((1, length, 1, 8)) for _ in range(3))
    segments = jnp.ones((1, length), jnp.int32)

    def total(*qkv):
        return attention(*qkv, q_segments_BL=segments, kv_segments_BS=segments, backend="xla").sum()

    gradient = jax.make_jaxpr(jax.grad(total, (0, 1, 2)))(query, key, value)
    assert length * BLOCK <= largest(gradient.jaxpr) <= length * length // 8
    _, backward = jax.eval_shape(functools.partial(jax.vjp, total), query, key, value)
    kept = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward))
    assert kept <= 8 * length * 8 + 8 * length


def test_block_count_is_bounded():
    for length in (1, BLOCK, BLOCK + 1, LONG, 5000, 131072):
        blocks = _blocks(length)
        assert len(blocks) <= MAX_BLOCKS
        assert blocks[0][0] == 0 and blocks[-1][1] == length
        assert all(a[1] == b[0] for a, b in itertools.pairwise(blocks))


def test_kernels_have_no_sinks():
    from itune.models.attention import _unsupported

    for kernel, platform in (("splash", "tpu"), ("cudnn", "gpu"), ("pallas", "gpu")):
        assert _unsupported(kernel, platform, None, None, True) == "it has no attention sinks"


def test_unknown_backend_lists_those_that_are_here():
    query, key, value = inputs(4)
    ones = np.ones((2, 4), np.int32)
    with pytest.raises(InputError, match=r"'magic'.*xla"):
        attention(query, key, value, q_segments_BL=ones, kv_segments_BS=ones, backend="magic")
