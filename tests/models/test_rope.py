"""Rotary frequencies against transformers, for every kind of scaling, both spellings, many bases and head widths."""

from __future__ import annotations

import jax
import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from itune.models.families.common import Fields, read_rope, write_rope
from itune.models.layers import rope_frequencies, rope_tables
from itune.types import InputError

KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32768},
    "yarn, mscale": {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, sharp": {
        "factor": 3.0,
        "original_max_position_embeddings": 2000,
        "truncate": False,
        "attention_factor": 1.5,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_equal_transformers(kind):
    for base in (500.0, 10000.0, 500000.0, 1e6):
        for head_dim in (8, 64, 96, 128):
            parameters = {"rope_type": kind.split(",")[0], "rope_theta": base} | KINDS[kind]
            config = transformers.LlamaConfig(
                hidden_size=2 * head_dim,
                num_attention_heads=2,
                head_dim=head_dim,
                max_position_embeddings=131072,
                rope_parameters=dict(parameters),
            )
            theirs = LlamaRotaryEmbedding(config)
            rope = read_rope(Fields({"rope_parameters": parameters, "max_position_embeddings": 131072}, "here"))
            ours = rope_frequencies(rope, head_dim)
            assert ours.dtype == np.float32
            np.testing.assert_allclose(
                ours, theirs.inv_freq.numpy(), rtol=3e-7
            )  # torch's power is off by a unit or two
            assert rope.attention_factor == pytest.approx(theirs.attention_scaling, abs=0)


@pytest.mark.parametrize("kind", KINDS)
def test_spellings_agree_and_survive_writing(kind):
    inner = {"rope_type": kind.split(",")[0]} | KINDS[kind]
    newer = read_rope(Fields({"rope_parameters": inner | {"rope_theta": 7e5}, "max_position_embeddings": 64}, ""))
    older = read_rope(Fields({"rope_theta": 7e5, "rope_scaling": inner, "max_position_embeddings": 64}, ""))
    oldest = {"type": inner["rope_type"], **{k: v for k, v in inner.items() if k != "rope_type"}}
    assert newer == older
    assert newer == read_rope(Fields({"rope_theta": 7e5, "rope_scaling": oldest, "max_position_embeddings": 64}, ""))
    assert newer == read_rope(Fields({"rope_parameters": write_rope(newer), "max_position_embeddings": 64}, ""))
    assert read_rope(Fields({"rope_theta": 7e5, "rope_scaling": None}, "")).base == 7e5


def test_unknown_scaling_lists_what_is_supported():
    with pytest.raises(
        InputError, match=r"'su' is not supported; supported: default, linear, llama3, yarn, dynamic, longrope"
    ):
        read_rope(Fields({"rope_scaling": {"rope_type": "su"}}, "config.json"))


def test_angles_stay_float32_in_bfloat16():
    rope = read_rope(Fields({"rope_theta": 1e4}, ""))
    positions = np.array([[30001]], np.int32)
    cos, sin = jax.jit(lambda p: rope_tables(rope, 64, p, "bfloat16"))(positions)
    assert cos.dtype == "bfloat16"
    angles = 30001 * rope_frequencies(rope, 64).astype(np.float64)
    np.testing.assert_allclose(np.asarray(cos, np.float64)[0, 0, 0], np.cos(angles), atol=8e-3)
    np.testing.assert_allclose(np.asarray(sin, np.float64)[0, 0, 0], np.sin(angles), atol=8e-3)
