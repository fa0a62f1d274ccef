"""Gemma 2: Gemma with norms before and after each part, soft caps, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import LayerKind, ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    POST_NORMS,
    Fields,
    read_layer_types,
    read_rope,
    write_layer_types,
    write_shared,
)
from itune.models.families.gemma import read_gemma

WEIGHTS = LLAMA_WEIGHTS | POST_NORMS | {"mlp_norm/scale": "model.layers.{layer}.pre_feedforward_layernorm.weight"}
IGNORED = (OLD_ROTARY,)


def read_gemma2(hf: Fields, softcaps: tuple[float | None, float | None]) -> dict[str, Any]:
    """The ModelConfig fields that Gemma 2 and 3 share; `softcaps` are the defaults of scores and logits."""
    scores, logits = ("attn_logit_softcapping", "final_logit_softcapping")
    return read_gemma(hf, kv_heads=4) | {
        "norm_placement": "both",
        "attention_scale": hf.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        "attention_softcap": hf.get(scores, float, None) if scores in hf.hf else softcaps[0],
        "logit_softcap": hf.get(logits, float, None) if logits in hf.hf else softcaps[1],
    }


def config_from_hf(hf: Fields) -> ModelConfig:
    window, rope = hf.get("sliding_window", int, 4096), read_rope(hf)
    kinds = {"sliding_attention": LayerKind(window, rope), "full_attention": LayerKind(None, rope)}
    default = [list(kinds)[i % 2] for i in range(hf.count("num_hidden_layers"))]
    types = read_layer_types(hf, window, default)
    return ModelConfig(**read_gemma2(hf, (50.0, 30.0)), kinds=tuple(kinds[name] for name in types))


def write_gemma2(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    shared = write_shared(config, model_type, architecture)
    assert config.attention_scale is not None
    scalar = config.attention_scale**-2
    return shared | {
        "hidden_activation": shared.pop("hidden_act"),
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": config.attention_softcap,
        "final_logit_softcapping": config.logit_softcap,
        "attention_bias": config.qkv_bias,
    }


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_gemma2(config, "gemma2", "Gemma2ForCausalLM") | write_layer_types(config)
