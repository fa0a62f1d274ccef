"""Granite 3: Llama with multipliers on embeddings, scores, residual branches and logits."""

from __future__ import annotations

import dataclasses
from typing import Any

from itune.models.architecture import ModelConfig
from itune.models.families import llama
from itune.models.families.common import Fields, write_shared
from itune.models.families.llama import IGNORED, WEIGHTS

__all__ = ["IGNORED", "WEIGHTS", "config_from_hf", "config_to_hf"]


def config_from_hf(hf: Fields) -> ModelConfig:
    return dataclasses.replace(
        llama.config_from_hf(hf),
        embed_scale=hf.get("embedding_multiplier", float, 1.0),
        attention_scale=hf.get("attention_multiplier", float, 1.0),
        residual_scale=hf.get("residual_multiplier", float, 1.0),
        logit_scale=1.0 / hf.get("logits_scaling", float, 1.0),
    )


def config_to_hf(config: ModelConfig) -> dict[str, Any]:
    return write_shared(config, "granite", "GraniteForCausalLM") | {
        "attention_bias": config.qkv_bias,
        "mlp_bias": config.mlp_bias,
        "embedding_multiplier": config.embed_scale,
        "attention_multiplier": config.attention_scale,
        "residual_multiplier": config.residual_scale,
        "logits_scaling": 1.0 / config.logit_scale,
    }
