"""Phi-3, Phi-3.5 and Phi-4: Llama with fused projections, longrope, and a part of each head rotated in some."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    ORIGINAL,
    Fields,
    read_rope,
    read_shared,
    read_uniform_kinds,
    rope_key,
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS | {
    "attention/qkv_proj/kernel": "model.layers.{layer}.self_attn.qkv_proj.weight",
    "mlp/gate_up_proj/kernel": "model.layers.{layer}.mlp.gate_up_proj.weight",
}
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    shared = read_shared(hf, kv_heads=None, head_dim=None)
    rope = read_rope(_longrope_by_old_names(hf), partial=True, original=4096)
    shared["norm_eps"] = hf.get("rms_norm_eps", float, 1e-5)
    return ModelConfig(
        **shared,
        kinds=read_uniform_kinds(hf, rope, hf.get("sliding_window", int, None)),
        fused_qkv=True,
        fused_gate_up=True,
    )


def _longrope_by_old_names(hf: Fields) -> Fields:
    """The first releases call longrope su or yarn."""
    key = rope_key(hf)
    nested = dict(hf.get(key, dict, {}))
    if nested.get("rope_type", nested.get("type")) in ("su", "yarn"):
        nested["rope_type"] = "longrope"
    return Fields(dict(hf.hf) | {key: nested}, hf.where)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    written = write_shared(config, "phi3", "Phi3ForCausalLM") | {"sliding_window": config.kinds[0].window}
    original = config.ropes[0].original_length
    return written | ({ORIGINAL: original} if original else {})
