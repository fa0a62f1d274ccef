"""Llama 2, 3, 3.1, 3.2 and what is built like them."""

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


def config_from_hf(hf: Fields) -> ModelConfig:
    bias = hf.get("attention_bias", bool, False)
    return ModelConfig(
        **read_shared(hf, kv_heads=None, head_dim=None),
        kinds=read_uniform_kinds(hf, read_rope(hf), window=None),
        qkv_bias=bias,
        out_bias=bias,
        mlp_bias=hf.get("mlp_bias", bool, False),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "llama", "LlamaForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
