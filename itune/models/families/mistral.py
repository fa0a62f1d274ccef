"""Mistral 7B and what is built like it: Llama with a sliding window in every layer."""

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
    read_window,
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    return ModelConfig(
        **read_shared(hf, kv_heads=8, head_dim=None),
        kinds=read_uniform_kinds(hf, read_rope(hf), read_window(hf, 4096)),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "mistral", "MistralForCausalLM") | {"sliding_window": config.kinds[0].window}
