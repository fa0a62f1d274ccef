"""Qwen2 and Qwen2.5: Llama with biases on query, key and value."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    Fields,
    read_mixed_kinds,
    read_rope,
    read_shared,
    read_switched_window,
    write_shared,
    write_windows,
)

WEIGHTS = LLAMA_WEIGHTS
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    window = read_switched_window(hf)
    first_windowed = hf.get("max_window_layers", int, 28)
    return ModelConfig(
        **read_shared(hf, kv_heads=32, head_dim=None),
        kinds=read_mixed_kinds(hf, read_rope(hf), window, first_windowed),
        qkv_bias=True,
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "qwen2", "Qwen2ForCausalLM") | write_windows(config)
