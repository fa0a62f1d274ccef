"""OLMo 2: norms after attention and MLP, and over all heads of queries and keys at once."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    POST_NORMS,
    Fields,
    read_rope,
    read_shared,
    read_uniform_kinds,
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS | POST_NORMS
IGNORED = (OLD_ROTARY,)


def read_olmo2(hf: Fields) -> dict[str, Any]:
    """The ModelConfig fields that OLMo 2 and 3 share."""
    bias = hf.get("attention_bias", bool, False)
    return read_shared(hf, kv_heads=None, head_dim=None) | {
        "norm_eps": hf.get("rms_norm_eps", float, 1e-5),
        "norm_placement": "post",
        "norm_float32": True,
        "qk_norm": True,
        "qk_norm_whole": True,
        "qkv_bias": bias,
        "out_bias": bias,
    }


def config_from_hf(hf: Fields) -> ModelConfig:
    return ModelConfig(**read_olmo2(hf), kinds=read_uniform_kinds(hf, read_rope(hf), window=None))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "olmo2", "Olmo2ForCausalLM") | {"attention_bias": config.qkv_bias}
