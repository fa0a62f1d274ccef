"""GPT-OSS: experts with a clamped gate and biases in every layer, attention sinks, a window in every other layer.

bfloat16 folders hold gate and up in turn in one tensor, and the experts' kernels as (in, out); MXFP4 folders
(itune/models/hf/mxfp4.py) hold them packed, as (out, in).
"""

from __future__ import annotations

from typing import Any

from itune.models.architecture import Experts, LayerKind, ModelConfig
from itune.models.families.common import (
    LLAMA_WEIGHTS,
    OLD_ROTARY,
    Fields,
    check_experts,
    layer_type,
    read_layer_types,
    read_rope,
    read_shared,
    write_layer_types,
    write_shared,
)
from itune.models.families.stored import Part

_MLP = "model.layers.{layer}.mlp."
WEIGHTS = LLAMA_WEIGHTS | {
    "attention/sinks": "model.layers.{layer}.self_attn.sinks",
    "mlp/router/kernel": _MLP + "router.weight",
    "mlp/router/bias": _MLP + "router.bias",
    "mlp/experts/gate_proj/kernel": Part(_MLP + "experts.gate_up_proj", 0, 2, transposed=True),
    "mlp/experts/up_proj/kernel": Part(_MLP + "experts.gate_up_proj", 1, 2, transposed=True),
    "mlp/experts/down_proj/kernel": Part(_MLP + "experts.down_proj", transposed=True),
    "mlp/experts/gate_proj/bias": Part(_MLP + "experts.gate_up_proj_bias", 0, 2),
    "mlp/experts/up_proj/bias": Part(_MLP + "experts.gate_up_proj_bias", 1, 2),
    "mlp/experts/down_proj/bias": _MLP + "experts.down_proj_bias",
}
IGNORED = (OLD_ROTARY,)
YARN = {  # of a config that says nothing
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip


def config_from_hf(hf: Fields) -> ModelConfig:
    shared = read_shared(hf, kv_heads=8, head_dim=64)
    experts = Experts(
        hf.count("num_local_experts", hf.get("num_experts", int, 128)),
        hf.count("num_experts_per_tok", 4),
        shared["mlp_width"],
        softmax_chosen=True,
        biases=True,
        clamp=(hf.get("swiglu_alpha", float, 1.702), hf.get("swiglu_limit", float, 7.0)),
    )
    check_experts(hf, experts)
    if "rope_parameters" not in hf:
        hf = Fields({**hf.hf, "rope_parameters": YARN}, hf.where)
    window, rope = hf.get("sliding_window", int, 128), read_rope(hf, 150000.0)
    kinds = {
        "sliding_attention": LayerKind(window, rope, experts),
        "full_attention": LayerKind(None, rope, experts),
    }
    default = [list(kinds)[i % 2] for i in range(hf.count("num_hidden_layers"))]
    bias = hf.get("attention_bias", bool, True)
    shared |= {"norm_eps": hf.get("rms_norm_eps", float, 1e-5), "norm_float32": True, "sinks": True}
    types = read_layer_types(hf, window, default)
    return ModelConfig(**shared, kinds=tuple(kinds[name] for name in types), qkv_bias=bias, out_bias=bias)


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    experts = config.kinds[0].experts
    assert experts is not None and experts.clamp is not None
    written = write_shared(config, "gpt_oss", "GptOssForCausalLM") | write_layer_types(config)
    windowed = any(layer_type(kind) == "sliding_attention" for kind in config.kinds)
    return written | {
        "sliding_window": written["sliding_window"] if windowed else 128,
        "num_local_experts": experts.count,
        "num_experts_per_tok": experts.chosen,
        "swiglu_alpha": experts.clamp[0],
        "swiglu_limit": experts.clamp[1],
        "attention_bias": config.qkv_bias,
    }
