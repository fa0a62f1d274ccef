"""Rotary frequencies against transformers, for every kind of scaling, both spellings, many bases and head widths."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from itune.models import load_model
from itune.models.families import FAMILIES
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


SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 20, "num_hidden_layers": 2, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "pad_token_id": None}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 500.0}
LONG = {"short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.0, 3.0, 4.0, 5.0]}
BOTH = {"full_attention": {"rope_type": "linear", "factor": 2.0}, "sliding_attention": {"rope_theta": 700.0}}


def folder_of(tmp_path, family, changes):
    """A folder with the config.json alone that transformers writes for a tiny model, with these keys; None: without."""
    config = transformers.CONFIG_MAPPING[family](**SIZES, **(EXPERTS if family in MOES else {}))
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text()) | changes
    left = {key: value for key, value in written.items() if changes.get(key, "") is not None}
    (tmp_path / "config.json").write_text(json.dumps(left))
    return tmp_path


MOES = ("mixtral", "qwen3_moe", "gpt_oss")
LAYERED = ("gemma3_text", "olmo3")
CASES = [
    *((family, {"rope_scaling": YARN}) for family in FAMILIES if family != "phi3"),  # beside rope_parameters
    *((family, {"rope_scaling": {"factor": 8.0}, "rope_parameters": BOTH, "rope_theta": 900.0}) for family in LAYERED),
    ("gpt_oss", {"rope_scaling": {}, "rope_parameters": None}),
    ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 24}),
    ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 99},
               "original_max_position_embeddings": 24}),
    ("qwen2", {"rope_parameters": YARN, "original_max_position_embeddings": 24}),
    ("olmo3", {"rope_parameters": {"full_attention": YARN}, "original_max_position_embeddings": 24}),
    ("phi3", {"rope_scaling": LONG | {"type": "longrope"}, "original_max_position_embeddings": 64}),
    ("phi3", {"rope_parameters": LONG | {"rope_type": "longrope", "original_max_position_embeddings": 64},
              "original_max_position_embeddings": 12}),
    ("phi3", {"rope_parameters": LONG | {"rope_type": "longrope", "original_max_position_embeddings": 64},
              "original_max_position_embeddings": None, "max_position_embeddings": 16384}),
]


@pytest.mark.parametrize(("family", "changes"), CASES, ids=lambda value: value if isinstance(value, str) else None)
def test_the_objects_of_a_config_have_the_precedence_that_transformers_gives_them(tmp_path, family, changes):
    folder = folder_of(tmp_path, family, changes)
    config = transformers.AutoConfig.from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    kinds = load_model(folder).config.kinds
    types = getattr(config, "layer_types", None) or ["full_attention"] * len(kinds)
    assert any(kind.rope for kind in kinds)
    for kind, name in zip(kinds, types, strict=True):
        if kind.rope is None:
            continue
        ours, prefix = rope_frequencies(kind.rope, 8), f"{name}_" if family in LAYERED else ""
        np.testing.assert_allclose(ours, getattr(theirs, f"{prefix}inv_freq").numpy(), rtol=3e-7)
        assert kind.rope.attention_factor == pytest.approx(getattr(theirs, f"{prefix}attention_scaling"))
        if kind.rope.scaling == "longrope":
            assert kind.rope.original_length == config.rope_parameters["original_max_position_embeddings"]


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_type": "longrope", "short_factor": [1.0] * 3, "long_factor": [2.0] * 4, "factor": 4.0},
         r"config.json: short_factor has 3 numbers; expected 4, one a rotated pair$"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [], "factor": 4.0},
         r"config.json: long_factor has 0 numbers; expected 4"),
        (YARN | {"rope_theta": 0.0}, r"config.json: rope_parameters: rope_theta is 0.0; expected a number above 0$"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings is 0; expected at least 1"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_rope_of_wrong_numbers_is_refused_when_the_model_is_loaded(tmp_path, family, rope, message):
    with pytest.raises(InputError, match=message):
        load_model(folder_of(tmp_path, family, {"rope_parameters": rope}))


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
