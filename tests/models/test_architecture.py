"""How layers are laid out: what is scanned, what is unrolled, and where each layer's parameters stand."""

from __future__ import annotations

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from itune.models import LayerKind, ModelConfig, Rope
from itune.models.architecture import layer_plan

A, B, C = LayerKind(None), LayerKind(4), LayerKind(None, None)


@pytest.mark.parametrize(
    ("kinds", "plan"),
    [
        ([A], (1, 1)),
        ([A] * 12, (1, 12)),
        ([A, B] * 5, (2, 5)),
        ([A, B] * 5 + [A], (2, 5)),  # the remainder is unrolled
        ([B, B, B, B, B, A] * 4 + [B, B], (6, 4)),  # Gemma 3
        ([A, A, A, C] * 9, (4, 9)),  # SmolLM3
        ([A] * 28 + [B] * 4, (1, 28)),  # Qwen2 with max_window_layers
        ([A, B, C], (3, 1)),
    ],
)
def test_shortest_repeating_block(kinds, plan):
    assert layer_plan(tuple(kinds)) == plan


@given(st.lists(st.sampled_from([A, B, C]), min_size=1, max_size=14))
def test_every_layer_has_its_kind(kinds):
    period, repeats = layer_plan(tuple(kinds))
    assert period * repeats <= len(kinds)
    assert (kinds[:period] * repeats) == kinds[: period * repeats]


def test_a_config_that_contradicts_itself_is_refused():
    fields = {"vocab_size": 8, "width": 8, "head_dim": 4, "mlp_width": 8, "max_length": 8, "num_layers": 2}
    with pytest.raises(ValueError, match="2 layers need as many kinds"):
        ModelConfig(**fields, num_heads=2, num_kv_heads=1, kinds=(A,))
    with pytest.raises(ValueError, match="not a multiple"):
        ModelConfig(**fields, num_heads=3, num_kv_heads=2, kinds=(A, A))


def test_every_parameter_has_logical_axes(make_model):
    model = make_model(qkv_bias=True, out_bias=True, mlp_bias=True, qk_norm=True, kinds=(A, B, A, B, A), num_layers=5)
    axes = model.logical_axes()
    ranks = jax.tree.map(lambda leaf: len(leaf.shape), model.abstract_params())
    assert jax.tree.map(len, axes, is_leaf=lambda x: isinstance(x, tuple)) == ranks
    assert axes["blocks"]["layer_1"]["attention"]["q_proj"]["kernel"] == ("layers", "heads", "embed")
    assert axes["rest_0"]["mlp"]["down_proj"]["kernel"] == ("embed", "mlp")
    assert axes["embed"]["embedding"] == ("vocab", "embed")


def test_model_is_a_static_argument(make_model):
    assert hash(make_model()) == hash(make_model())
    assert make_model() == make_model()
    assert make_model() != make_model(norm_eps=1e-5)
    assert make_model().config.ropes == (Rope(),)


def test_rows_beyond_dynamic_rope_are_refused(make_model):
    from itune.types import InputError

    model = make_model(kinds=(LayerKind(None, Rope(scaling="dynamic", factor=2.0, original_length=16)),), num_layers=1)
    params = model.abstract_params()
    ids = jax.ShapeDtypeStruct((1, 16), "int32")
    assert jax.eval_shape(model.hidden, params, ids).shape == (1, 16, 16)
    with pytest.raises(InputError, match="rows of 17 tokens"):
        jax.eval_shape(model.hidden, params, jax.ShapeDtypeStruct((1, 17), "int32"))
