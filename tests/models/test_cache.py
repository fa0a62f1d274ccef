"""Cached prefill and decode give the hidden states of the full forward pass, with padding on either side."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from itune.models import LayerKind, Rope
from itune.models.architecture import Experts

# alternating layers with an unrolled one after them: windows, two rotary bases, none
WINDOW, FULL = LayerKind(4, Rope()), LayerKind(None, Rope(base=100.0))
KINDS = (WINDOW, FULL, WINDOW, FULL, LayerKind(4, None))
# every prompt is beyond the original context of longrope: no row may cross it in one cache (tests/test_decode.py)
LONG = Rope(scaling="longrope", original_length=2, short_factors=(1.0, 2.0), long_factors=(3.0, 4.0), share=0.5)
CLAMPED = Experts(4, 2, 12, biases=True, clamp=(1.7, 1.0))
MANY = LayerKind(3, LONG, Experts(4, 2, 12)), LayerKind(None, Rope(), CLAMPED), LayerKind(None, LONG)
SCALED = {"attention_scale": 0.2, "attention_softcap": 1.5, "embed_scale": 2.0, "residual_scale": 0.7, "sinks": True}
PLACED = {"norm_placement": "both", "norm_offset": True, "norm_float32": True, "qk_norm_whole": True}
FUSED = {"fused_qkv": True, "fused_gate_up": True, "qkv_bias": False}


@pytest.mark.parametrize(
    ("kinds", "fields"), [(KINDS, {}), (MANY, SCALED | PLACED | FUSED)], ids=["plain", "all"]
)
def test_decode_equals_the_full_forward(make_model, random_params, kinds, fields):
    model = make_model(kinds=kinds, num_layers=len(kinds), qk_norm=True, **fields)
    params = random_params(model)
    rng = np.random.default_rng(0)
    prompts, sides, steps, width = [3, 8, 5, 6], ["left", "right"] * 2, 6, 8
    whole_BL = rng.integers(0, 48, (4, width + steps))
    full_BLD = np.asarray(jax.jit(model.hidden)(params, whole_BL))  # causal: a row's end may be anything

    tokens, segments, positions = (np.zeros((4, width), np.int32) for _ in range(3))
    for i, (n, side) in enumerate(zip(prompts, sides)):
        place = slice(width - n, width) if side == "left" else slice(0, n)
        tokens[i, place], segments[i, place], positions[i, place] = whole_BL[i, :n], 1, np.arange(n)
    step = jax.jit(model.hidden_with_cache)
    hidden, cache = step(params, tokens, positions, model.init_cache(4, width + steps), segment_ids_BL=segments)
    for i, n in enumerate(prompts):
        np.testing.assert_allclose(hidden[i][segments[i] == 1], full_BLD[i, :n], atol=1e-5)
    for t in range(steps):
        at = np.array(prompts)[:, None] + t
        hidden, cache = step(params, np.take_along_axis(whole_BL, at, 1), at, cache)
        np.testing.assert_allclose(hidden[:, 0], full_BLD[np.arange(4), at[:, 0]], atol=1e-5)
    assert int(cache["index"]) == width + steps
    assert np.abs(full_BLD).max() > 1


def test_cache_has_static_shapes_and_the_compute_dtype(make_model):
    model = make_model(num_layers=2)
    cache = model.init_cache(3, 10)
    pair = cache["blocks"][0]
    assert pair["key"].shape == (2, 3, 2, 10, 8)
    assert pair["value"].dtype == model.compute_dtype
    assert cache["rest"] == ()
    tokens = np.zeros((3, 4), np.int32)
    _, after = jax.eval_shape(model.hidden_with_cache, model.abstract_params(), tokens, tokens, cache)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(lambda x: (x.shape, x.dtype), cache)
