"""Which model families are read and written. To add one: a file here, and a line in FAMILIES.

A family is a module with
    config_from_hf(hf: Fields) -> ModelConfig      config.json of either spelling
    config_to_hf(config: ModelConfig) -> dict      config.json in the newer spelling
    WEIGHTS: {our parameter: tensor name}          parameters of a layer carry `{layer}` in the tensor's name
    IGNORED: regular expressions of tensors that a checkpoint may hold and the model does not use
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from itune.models.families import llama, mistral, qwen2, qwen3
from itune.types import InputError

FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral, "qwen2": qwen2, "qwen3": qwen3}


def find_family(hf: dict[str, Any], where: str) -> str:
    """The name of the family of a config.json, or InputError that lists those that are supported."""
    model_type = hf.get("model_type")
    if model_type not in FAMILIES:
        found = f"model_type {model_type!r}" if model_type else "no model_type"
        raise InputError(f"{where}: {found} is not supported; supported: {', '.join(FAMILIES)}")
    return str(model_type)
