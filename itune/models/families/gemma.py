"""Gemma 1: scaled embeddings, norms that multiply by one plus their scale, a tanh GELU, tied head."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    Fields,
    read_rope,
    read_shared,
    read_uniform_kinds,
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS
IGNORED = (OLD_ROTARY,)


def read_gemma(hf: Fields, kv_heads: int | None) -> dict[str, Any]:
    """The ModelConfig fields that all Gemmas share."""
    bias = hf.get("attention_bias", bool, False)
    shared = read_shared(hf, kv_heads=kv_heads, head_dim=256)
    # the first releases say gelu in hidden_act and mean its tanh approximation
    older = "hidden_activation" not in hf and hf.get("hidden_act", str, "gelu") == "gelu"
    return shared | {
        "activation": "gelu_pytorch_tanh" if older else shared["activation"],
        "tie_embeddings": hf.get("tie_word_embeddings", bool, True),
        "embed_scale": shared["width"] ** 0.5,
        "norm_offset": True,
        "norm_float32": True,
        "qkv_bias": bias,
        "out_bias": bias,
    }


def config_from_hf(hf: Fields) -> ModelConfig:
    return ModelConfig(**read_gemma(hf, kv_heads=16), kinds=read_uniform_kinds(hf, read_rope(hf), window=None))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "gemma", "GemmaForCausalLM") | {"attention_bias": config.qkv_bias}
