"""What the families share: typed config fields with an address, rope in both spellings, the usual tensor names."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

from itune.models.architecture import LayerKind, ModelConfig, Rope
from itune.models.layers import ACTIVATIONS
from itune.types import InputError

log = logging.getLogger("itune")

# our parameter -> tensor of the checkpoint, for models laid out as Llama is
LLAMA_WEIGHTS: dict[str, str] = {
    "embed/embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "lm_head/kernel": "lm_head.weight",
    "attention_norm/scale": "model.layers.{layer}.input_layernorm.weight",
    "mlp_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    **{
        f"attention/{name}_proj/{ours}": f"model.layers.{{layer}}.self_attn.{name}_proj.{theirs}"
        for name in "qkvo"
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **{
        f"mlp/{name}_proj/{ours}": f"model.layers.{{layer}}.mlp.{name}_proj.{theirs}"
        for name in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
    **{f"attention/{name}_norm/scale": f"model.layers.{{layer}}.self_attn.{name}_norm.weight" for name in "qk"},
}
OLD_ROTARY = r".*\.rotary_emb\.inv_freq"  # a buffer that older checkpoints saved; it follows from the config

ROPES = ("default", "linear", "llama3", "yarn", "dynamic")
_REQUIRED = object()


class Fields:
    """The keys of a config.json. Reading one checks its type; an error names the file and the key."""

    def __init__(self, hf: Mapping[str, Any], where: str):
        self.hf = hf
        self.where = where

    def __contains__(self, key: str) -> bool:
        return self.hf.get(key) is not None

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value as `kind`; null and absent take the default, and without a default are an error."""
        value = self.hf.get(key)
        if value is None:
            if default is _REQUIRED:
                raise InputError(f"{self.where}: key {key!r} is missing; expected {kind.__name__}")
            return default
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{self.where}: {key} is {value!r}; expected {kind.__name__}")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        """An int of at least 1."""
        value = self.get(key, int, default)
        if value < 1:
            raise InputError(f"{self.where}: {key} is {value}; expected at least 1")
        return value

    def section(self, key: str) -> Fields:
        """A nested object, empty when absent."""
        return Fields(self.get(key, dict, {}), f"{self.where}: {key}")


def read_rope(hf: Fields) -> Rope:
    """Rotary settings from `rope_parameters` (newer), or from `rope_theta` and `rope_scaling` (older)."""
    nested = hf.section("rope_parameters" if "rope_parameters" in hf else "rope_scaling")
    base = nested.get("rope_theta", float, hf.get("rope_theta", float, 10000.0))
    kind = nested.get("rope_type", str, nested.get("type", str, "default"))
    max_length = hf.get("max_position_embeddings", int, 0)
    share = nested.get("partial_rotary_factor", float, hf.get("partial_rotary_factor", float, 1.0))
    if share != 1.0:
        raise InputError(f"{hf.where}: partial_rotary_factor {share} is not supported for this family; expected 1")
    if kind == "default":
        return Rope(base=base)
    if kind == "linear":
        return Rope(base=base, scaling="linear", factor=nested.get("factor", float))
    original = nested.get("original_max_position_embeddings", int, max_length)
    if kind == "dynamic":
        factor = nested.get("factor", float)
        return Rope(base=base, scaling="dynamic", factor=factor, original_length=max_length)
    if kind == "llama3":
        return Rope(
            base=base,
            scaling="llama3",
            factor=nested.get("factor", float),
            original_length=original,
            low_freq_factor=nested.get("low_freq_factor", float),
            high_freq_factor=nested.get("high_freq_factor", float),
        )
    if kind == "yarn":
        factor = nested.get("factor", float, max_length / original)
        return Rope(
            base=base,
            scaling="yarn",
            factor=factor,
            original_length=original,
            beta_fast=nested.get("beta_fast", float, 32.0),
            beta_slow=nested.get("beta_slow", float, 1.0),
            truncate=nested.get("truncate", bool, True),
            attention_factor=_yarn_attention_factor(nested, factor),
        )
    raise InputError(f"{nested.where}: rope type {kind!r} is not supported; supported: {', '.join(ROPES)}")


def _yarn_attention_factor(nested: Fields, factor: float) -> float:
    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in nested:
        return nested.get("attention_factor", float)
    over, under = nested.get("mscale", float, 0.0), nested.get("mscale_all_dim", float, 0.0)
    return scale(over) / scale(under) if over and under else scale(1.0)


def write_rope(rope: Rope) -> dict[str, Any]:
    """The `rope_parameters` object of a config.json."""
    fields: dict[str, Any] = {
        "rope_type": "default" if rope.scaling == "none" else rope.scaling,
        "rope_theta": rope.base,
    }
    if rope.scaling != "none":
        fields["factor"] = rope.factor
    if rope.scaling in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        fields |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        fields |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        fields["attention_factor"] = rope.attention_factor
    return fields


def read_uniform_kinds(hf: Fields, rope: Rope, window: int | None) -> tuple[LayerKind, ...]:
    """The same kind for every layer; `layer_types` that say otherwise are an error."""
    kinds = (LayerKind(window, rope),) * hf.count("num_hidden_layers")
    if "layer_types" in hf and read_mixed_kinds(hf, rope, window, 0) != kinds:
        raise InputError(f"{hf.where}: layer_types: found different layers; expected one kind of layer in this family")
    return kinds


def read_mixed_kinds(hf: Fields, rope: Rope, window: int | None, first_windowed: int) -> tuple[LayerKind, ...]:
    """One kind a layer: from `layer_types` where the config has it, else the window holds from `first_windowed` on."""
    layers = hf.count("num_hidden_layers")
    types = hf.get("layer_types", list, None)
    if types is None:
        return tuple(LayerKind(window if i >= first_windowed else None, rope) for i in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted({str(name) for name in types} - set(known))
    if unknown or len(types) != layers:
        found = f"layer type {', '.join(unknown)}" if unknown else f"{len(types)} layer types for {layers} layers"
        raise InputError(f"{hf.where}: layer_types: found {found}; expected one of {', '.join(known)} for each layer")
    if window is None and "sliding_attention" in types:
        raise InputError(
            f"{hf.where}: layer_types has sliding_attention but sliding_window is not set; expected a number of tokens"
        )
    return tuple(LayerKind(known[name], rope) for name in types)


def read_shared(hf: Fields, *, kv_heads: int | None, head_dim: int | None) -> dict[str, Any]:
    """The ModelConfig fields that all families read alike; `kv_heads` and `head_dim` are the family's defaults."""
    activation = hf.get("hidden_act", str, "silu")
    if activation not in ACTIVATIONS:
        raise InputError(f"{hf.where}: hidden_act {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if hf.get("attention_dropout", float, 0.0):
        log.warning(
            "%s: attention_dropout %s is not applied; training runs without it", hf.where, hf.hf["attention_dropout"]
        )
    width, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    if head_dim is None and "head_dim" not in hf and width % heads:
        raise InputError(
            f"{hf.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}; set head_dim"
        )
    num_kv_heads = hf.count("num_key_value_heads", heads if kv_heads is None else kv_heads)
    if heads % num_kv_heads:
        raise InputError(
            f"{hf.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {num_kv_heads}"
        )
    size = hf.count("head_dim", head_dim or width // heads)
    if size % 2:
        raise InputError(f"{hf.where}: head_dim {size} is odd; rotary embeddings need an even one")
    return {
        "vocab_size": hf.count("vocab_size"),
        "width": width,
        "num_layers": hf.count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": size,
        "mlp_width": hf.count("intermediate_size"),
        "max_length": hf.count("max_position_embeddings", 2048),
        "activation": activation,
        "norm_eps": hf.get("rms_norm_eps", float, 1e-6),
        "tie_embeddings": hf.get("tie_word_embeddings", bool, False),
        "init_std": hf.get("initializer_range", float, 0.02),
    }


def write_shared(config: ModelConfig, model_type: str, architecture: str) -> dict[str, Any]:
    """The config.json keys that all families write alike, in the newer spelling."""
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "max_position_embeddings": config.max_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "rope_parameters": write_rope(config.ropes[0]),
    }


def write_windows(config: ModelConfig) -> dict[str, Any]:
    """The sliding-window keys of Qwen configs."""
    windows = {kind.window for kind in config.kinds} - {None}
    types = ["full_attention" if kind.window is None else "sliding_attention" for kind in config.kinds]
    return {"use_sliding_window": bool(windows), "sliding_window": next(iter(windows), None), "layer_types": types}
