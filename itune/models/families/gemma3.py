"""Gemma 3, text: Gemma 2 with query and key norms, no soft caps, five windowed layers to a full one, two ropes."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import LayerKind, ModelConfig
from itune.models.families.common import Fields, read_layer_ropes, read_layer_types, write_layer_ropes
from itune.models.families.gemma2 import IGNORED, WEIGHTS, read_gemma2, write_gemma2
from itune.types import InputError

__all__ = ["IGNORED", "WEIGHTS", "config_from_hf", "config_to_hf"]


def config_from_hf(hf: Fields) -> ModelConfig:
    if hf.get("use_bidirectional_attention", bool, False):
        raise InputError(f"{hf.where}: use_bidirectional_attention is true; expected a causal model")
    window, ropes = hf.get("sliding_window", int, 4096), read_layer_ropes(hf, 1e6, 1e4)
    kinds = {
        "sliding_attention": LayerKind(window, ropes["sliding_attention"]),
        "full_attention": LayerKind(None, ropes["full_attention"]),
    }
    pattern = hf.count("sliding_window_pattern", 6)
    default = [list(kinds)[(i + 1) % pattern == 0] for i in range(hf.count("num_hidden_layers"))]
    types = read_layer_types(hf, window, default)
    return ModelConfig(**read_gemma2(hf, (None, None)), qk_norm=True, kinds=tuple(kinds[name] for name in types))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_gemma2(config, "gemma3_text", "Gemma3ForCausalLM") | write_layer_ropes(config)
