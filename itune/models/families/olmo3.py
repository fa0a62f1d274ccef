"""OLMo 3: OLMo 2 with three windowed layers to a full one; rope scaling holds for the full ones alone."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import LayerKind, ModelConfig
from itune.models.families.common import Fields, read_layer_ropes, read_layer_types, write_layer_ropes, write_shared
from itune.models.families.olmo2 import IGNORED, WEIGHTS, read_olmo2

__all__ = ["IGNORED", "WEIGHTS", "config_from_hf", "config_to_hf"]


def config_from_hf(hf: Fields) -> ModelConfig:
    base = hf.get("rope_theta", float, 500000.0)
    window, ropes = hf.get("sliding_window", int, 4096), read_layer_ropes(hf, base, base)
    kinds = {
        "sliding_attention": LayerKind(window, ropes["sliding_attention"]),
        "full_attention": LayerKind(None, ropes["full_attention"]),
    }
    default = [list(kinds)[(i + 1) % 4 == 0] for i in range(hf.count("num_hidden_layers"))]
    types = read_layer_types(hf, window, default)
    return ModelConfig(**read_olmo2(hf), kinds=tuple(kinds[name] for name in types))


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    shared = write_shared(config, "olmo3", "Olmo3ForCausalLM") | write_layer_ropes(config)
    return shared | {"attention_bias": config.qkv_bias}
