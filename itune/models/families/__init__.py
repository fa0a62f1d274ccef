"""Which model families are read and written. To add one: a file here, and a line in FAMILIES.

A family is a module with
    config_from_hf(hf: Fields) -> ModelConfig      config.json of either spelling
    config_to_hf(config: ModelConfig) -> dict      config.json in the newer spelling
    WEIGHTS: {our parameter: tensor name}          of a layer: with `{layer}`; of an expert in it: and `{expert}`;
                                                   a Part (stored.py) where the tensor has another shape
    IGNORED: regular expressions of tensors that a checkpoint may hold and the model does not use
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from itune.models.families import (
    gemma,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from itune.models.families.stored import as_part
from itune.types import InputError

# model_type of config.json -> module
FAMILIES: dict[str, ModuleType] = {
    "llama": llama,
    "mistral": mistral,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "gemma": gemma,
    "gemma2": gemma2,
    "gemma3_text": gemma3,
    "phi3": phi3,
    "olmo2": olmo2,
    "olmo3": olmo3,
    "smollm3": smollm3,
    "granite": granite,
    "gpt_oss": gpt_oss,
}


def find_family(hf: dict[str, Any], where: str, tensors: Callable[[], Iterable[str]] = tuple) -> str:
    """The name of the family of a config.json, or InputError that lists those that are supported.

    `tensors` gives the names of the checkpoint's tensors: families that know them all are named in the message.
    """
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        found = f"model_type {model_type!r}" if model_type else "no model_type"
        alike = families_of(tensors())
        hint = f"; its tensors have the names of {' or '.join(alike)}: if it is built so, set that" if alike else ""
        raise InputError(f"{where}: {found} is not supported; supported: {', '.join(FAMILIES)}{hint}")
    return model_type


def families_of(tensors: Iterable[str]) -> list[str]:
    """The families whose weight map has all of these tensors, none for no tensors."""
    numbered = (re.sub(r"\bexperts\.\d+", "experts.{expert}", name) for name in tensors)
    names = {re.sub(r"\blayers\.\d+", "layers.{layer}", name) for name in numbered}
    names = {re.sub(r"_(blocks|scales)$", "", name) for name in names}  # of mxfp4
    known = {family: {as_part(entry).name for entry in FAMILIES[family].WEIGHTS.values()} for family in FAMILIES}
    return [family for family in FAMILIES if names and names <= known[family]]
