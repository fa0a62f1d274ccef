"""SmolLM3: Llama without position embedding in every fourth layer."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import LayerKind, ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    Fields,
    read_layer_types,
    read_rope,
    read_shared,
    write_shared,
    write_windows,
)
from itune.types import InputError

WEIGHTS = LLAMA_WEIGHTS
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    bias, layers = hf.get("attention_bias", bool, False), hf.count("num_hidden_layers")
    interval = hf.count("no_rope_layer_interval", 4)
    rotated = hf.get("no_rope_layers", list, [int((i + 1) % interval != 0) for i in range(layers)])
    if len(rotated) < layers:
        raise InputError(f"{hf.where}: no_rope_layers has {len(rotated)} entries; expected {layers}, one a layer")
    window = hf.get("sliding_window", int, None) if hf.get("use_sliding_window", bool, False) else None
    default = ["sliding_attention" if window and not rotated[i] else "full_attention" for i in range(layers)]
    rope = read_rope(hf, 2e6)
    kinds = tuple(
        LayerKind(window if name == "sliding_attention" else None, rope if use else None)
        for name, use in zip(read_layer_types(hf, window, default), rotated, strict=False)
    )
    shared = read_shared(hf, kv_heads=4, head_dim=None)
    shared["tie_embeddings"] = hf.get("tie_word_embeddings", bool, True)
    return ModelConfig(
        **shared, kinds=kinds, qkv_bias=bias, out_bias=bias, mlp_bias=hf.get("mlp_bias", bool, False)
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "smollm3", "SmolLM3ForCausalLM") | write_windows(config) | {
        "no_rope_layers": [int(kind.rope is not None) for kind in config.kinds],
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
    }
