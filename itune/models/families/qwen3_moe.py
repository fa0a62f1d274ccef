"""Qwen3-MoE: Qwen3 with experts in all layers, or in all but some."""

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
    read_switched_window,
    write_shared,
)

WEIGHTS = LLAMA_WEIGHTS | {
    "mlp/router/kernel": "model.layers.{layer}.mlp.gate.weight",
    **{
        f"mlp/experts/{name}_proj/kernel": f"model.layers.{{layer}}.mlp.experts.{{expert}}.{name}_proj.weight"
        for name in ("gate", "up", "down")
    },
}
IGNORED = (OLD_ROTARY,)


def config_from_hf(hf: Fields) -> ModelConfig:
    window = read_switched_window(hf)
    # files of transformers 5 have the second name as well
    count = hf.count("num_experts", hf.get("num_local_experts", int, 128))
    experts = Experts(
        count,
        hf.count("num_experts_per_tok", 8),
        hf.count("moe_intermediate_size", 768),
        normalise=hf.get("norm_topk_prob", bool, False),
    )
    check_experts(hf, experts)
    rope, dense = read_rope(hf), hf.get("mlp_only_layers", list, [])
    step = hf.count("decoder_sparse_step", 1)
    kinds = tuple(
        LayerKind(window, rope, experts if i not in dense and (i + 1) % step == 0 else None)
        for i in range(hf.count("num_hidden_layers"))
    )
    bias = hf.get("attention_bias", bool, False)
    shared = read_shared(hf, kv_heads=4, head_dim=None)
    return ModelConfig(**shared, kinds=kinds, qkv_bias=bias, out_bias=bias, qk_norm=True)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    dense = [i for i, kind in enumerate(config.kinds) if kind.experts is None]
    experts = next((kind.experts for kind in config.kinds if kind.experts is not None), None)
    switches = {} if experts is None else {  # every layer dense: nothing to say of experts
        "num_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "moe_intermediate_size": experts.width,
        "norm_topk_prob": experts.normalise,
    }
    return write_shared(config, "qwen3_moe", "Qwen3MoeForCausalLM") | {
        "use_sliding_window": config.kinds[0].window is not None,
        "sliding_window": config.kinds[0].window,
        **switches,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "attention_bias": config.qkv_bias,
    }
