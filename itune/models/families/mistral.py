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
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    # transformers reads an absent key as 4096 and null as no window
    window = hf.get("sliding_window", int, None) if "sliding_window" in hf.hf else 4096
    return ModelConfig(
        **read_shared(hf, kv_heads=8, head_dim=None),
        kinds=read_uniform_kinds(hf, read_rope(hf), window),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "mistral", "MistralForCausalLM") | {"sliding_window": config.kinds[0].window}
