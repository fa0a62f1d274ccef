"""Mixtral: Mistral with experts in every layer, two of them a token."""

from __future__ import annotations

from typing import Any

from itune.models.architecture import Experts, LayerKind, ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    Fields,
    check_experts,
    read_rope,
    read_shared,
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS | {
    "mlp/router/kernel": "model.layers.{layer}.block_sparse_moe.gate.weight",
    **{
        f"mlp/experts/{ours}_proj/kernel": f"model.layers.{{layer}}.block_sparse_moe.experts.{{expert}}.{theirs}.weight"
        for ours, theirs in (("gate", "w1"), ("down", "w2"), ("up", "w3"))
    },
}
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    shared = read_shared(hf, kv_heads=8, head_dim=None)
    experts = Experts(hf.count("num_local_experts", 8), hf.count("num_experts_per_tok", 2), shared["mlp_width"])
    kind = LayerKind(hf.get("sliding_window", int, None), read_rope(hf, 1e6), check_experts(hf, experts))
    shared["norm_eps"] = hf.get("rms_norm_eps", float, 1e-5)
    return ModelConfig(**shared, kinds=(kind,) * shared["num_layers"])


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    kind = config.kinds[0]
    assert kind.experts is not None
    return write_shared(config, "mixtral", "MixtralForCausalLM") | {
        "sliding_window": kind.window,
        "num_local_experts": kind.experts.count,
        "num_experts_per_tok": kind.experts.chosen,
    }
