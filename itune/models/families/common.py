"""What the families share: typed config fields with an address, rope in both spellings, the usual tensor names."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from itune.models.architecture import Experts, LayerKind, ModelConfig, Rope
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

# layers with a norm after attention and one after the MLP
POST_NORMS: dict[str, str] = {
    "attention_post_norm/scale": "model.layers.{layer}.post_attention_layernorm.weight",
    "mlp_post_norm/scale": "model.layers.{layer}.post_feedforward_layernorm.weight",
}

ROPES = ("default", "linear", "llama3", "yarn", "dynamic", "longrope")
ORIGINAL = "original_max_position_embeddings"
_REQUIRED = object()
# each is a loop of ours while a program is traced
_MOST = {"num_hidden_layers": 4096, "num_attention_heads": 1024, "num_key_value_heads": 1024}


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
        """An int of at least 1, and not so large that no array or program of it can exist."""
        value, most = self.get(key, int, default), _MOST.get(key, 2**31 - 1)
        if not 1 <= value <= most:
            raise InputError(f"{self.where}: {key} is {value}; expected " +
                             ("at least 1" if value < 1 else f"at most {most}"))
        return value

    def section(self, key: str) -> Fields:
        """A nested object, empty when absent."""
        return Fields(self.get(key, dict, {}), f"{self.where}: {key}")


def rope_key(hf: Fields) -> str:
    """Which object of a config holds its rope: as in transformers `rope_scaling` (older) before `rope_parameters`."""
    return "rope_scaling" if hf.get("rope_scaling", dict, {}) else "rope_parameters"


def read_rope(hf: Fields, base: float = 10000.0, partial: bool = False, original: int | None = None) -> Rope:
    """Rotary settings from `rope_parameters` (newer), or from `rope_theta` and `rope_scaling` (older).

    `base` and `original` are the family's defaults, of the base and of the length of pretraining, which a config may
    name beside the object; `partial`: whether the family may rotate a part of a head's channels.
    """
    nested = hf.section(rope_key(hf))
    if ORIGINAL in hf or original:
        nested = Fields({**nested.hf, ORIGINAL: hf.count(ORIGINAL, original)}, nested.where)
    rope = read_scaling(hf, nested, hf.get("rope_theta", float, base))
    share = nested.get("partial_rotary_factor", float, hf.get("partial_rotary_factor", float, 1.0))
    if share != 1.0 and not partial:
        raise InputError(f"{hf.where}: partial_rotary_factor {share} is not supported for this family; expected 1")
    return dataclasses.replace(rope, share=share)


def read_scaling(hf: Fields, nested: Fields, base: float) -> Rope:
    """Rotary settings of one object of a config; `hf` is the config around it."""
    base = nested.get("rope_theta", float, base)
    if base <= 0:
        raise InputError(f"{nested.where}: rope_theta is {base}; expected a number above 0")
    kind = nested.get("rope_type", str, nested.get("type", str, "default"))
    max_length = hf.get("max_position_embeddings", int, 0)
    if kind == "default":
        return Rope(base=base)
    if kind == "linear":
        return Rope(base=base, scaling="linear", factor=nested.get("factor", float))
    if kind == "dynamic":
        factor = nested.get("factor", float)
        return Rope(base=base, scaling="dynamic", factor=factor, original_length=max_length)
    if kind in ("llama3", "yarn", "longrope"):
        original = nested.count(ORIGINAL, max_length)
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
    if kind == "longrope":
        factor = nested.get("factor", float, max_length / original)
        default = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return Rope(
            base=base,
            scaling="longrope",
            factor=factor,
            original_length=original,
            attention_factor=nested.get("attention_factor", float, default),
            short_factors=read_floats(nested, "short_factor"),
            long_factors=read_floats(nested, "long_factor"),
        )
    raise InputError(f"{nested.where}: rope type {kind!r} is not supported; supported: {', '.join(ROPES)}")


def read_floats(hf: Fields, key: str) -> tuple[float, ...]:
    """A list of numbers."""
    values = hf.get(key, list)
    if not all(isinstance(x, (int, float)) for x in values):
        raise InputError(f"{hf.where}: {key} is {values!r}; expected numbers")
    return tuple(float(x) for x in values)


def read_layer_ropes(hf: Fields, full: float, sliding: float) -> dict[str, Rope]:
    """The ropes of `full_attention` and `sliding_attention` layers.

    Newer configs have an object each in `rope_parameters`; `rope_scaling` of older ones is for full attention alone and
    goes before it, key by key. Bases that the objects lack are `rope_theta` and `rope_local_base_freq` beside them;
    `full` and `sliding` are the family's defaults.
    """
    both, scaling = hf.section("rope_parameters"), hf.section("rope_scaling")
    newer = both.section("full_attention")
    ropes = {
        "full_attention": (Fields({**newer.hf, **scaling.hf}, (scaling if scaling.hf else newer).where),
                           hf.get("rope_theta", float, full)),
        "sliding_attention": (both.section("sliding_attention"), hf.get("rope_local_base_freq", float, sliding)),
    }
    return {name: read_scaling(hf, nested, base) for name, (nested, base) in ropes.items()}


def check_longrope(hf: Fields, config: ModelConfig) -> None:
    """Raise InputError where longrope has not one factor for each pair of rotated channels."""
    for rope in config.ropes:
        pairs = int(config.head_dim * rope.share) // 2
        for key, factors in (("short_factor", rope.short_factors), ("long_factor", rope.long_factors)):
            if rope.scaling == "longrope" and len(factors) != pairs:
                raise InputError(f"{hf.where}: {key} has {len(factors)} numbers; expected {pairs}, one a rotated pair")


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
    if rope.share != 1.0:
        fields["partial_rotary_factor"] = rope.share
    if rope.scaling in ("llama3", "yarn", "longrope"):
        fields["original_max_position_embeddings"] = rope.original_length
    if rope.scaling == "llama3":
        fields |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    if rope.scaling == "yarn":
        fields |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
        fields["attention_factor"] = rope.attention_factor
    if rope.scaling == "longrope":
        fields |= {"short_factor": list(rope.short_factors), "long_factor": list(rope.long_factors)}
        fields["attention_factor"] = rope.attention_factor
    return fields


def write_layer_ropes(config: ModelConfig) -> dict[str, Any]:
    """`layer_types`, `sliding_window`, and the ropes of both kinds of layer."""
    ropes = dict.fromkeys(("full_attention", "sliding_attention"), config.ropes[0])
    ropes |= {layer_type(kind): kind.rope for kind in config.kinds if kind.rope is not None}
    return write_layer_types(config) | {"rope_parameters": {name: write_rope(rope) for name, rope in ropes.items()}}


def write_layer_types(config: ModelConfig) -> dict[str, Any]:
    windows = {kind.window for kind in config.kinds} - {None}
    return {
        "sliding_window": next(iter(windows), None),
        "layer_types": [layer_type(kind) for kind in config.kinds],
    }


def layer_type(kind: LayerKind) -> str:
    return "full_attention" if kind.window is None else "sliding_attention"


def read_uniform_kinds(hf: Fields, rope: Rope, window: int | None) -> tuple[LayerKind, ...]:
    """The same kind for every layer; `layer_types` that say otherwise are an error."""
    kinds = (LayerKind(window, rope),) * hf.count("num_hidden_layers")
    if "layer_types" in hf and read_mixed_kinds(hf, rope, window, 0) != kinds:
        raise InputError(f"{hf.where}: layer_types: found different layers; expected one kind of layer in this family")
    return kinds


def read_window(hf: Fields, default: int) -> int | None:
    """`sliding_window`: null is no window, an absent key the family's default."""
    return hf.get("sliding_window", int, None) if "sliding_window" in hf.hf else default


def read_switched_window(hf: Fields) -> int | None:
    """`sliding_window` where `use_sliding_window` switches it on, as in Qwen configs."""
    return read_window(hf, 4096) if hf.get("use_sliding_window", bool, False) else None


def read_mixed_kinds(hf: Fields, rope: Rope, window: int | None, first_windowed: int) -> tuple[LayerKind, ...]:
    """One kind a layer: from `layer_types` where the config has it, else the window holds from `first_windowed` on."""
    if "layer_types" not in hf:
        layers = hf.count("num_hidden_layers")
        return tuple(LayerKind(window if i >= first_windowed else None, rope) for i in range(layers))
    known = {"full_attention": None, "sliding_attention": window}
    return tuple(LayerKind(known[name], rope) for name in read_layer_types(hf, window, ()))


def read_layer_types(hf: Fields, window: int | None, default: Sequence[str]) -> Sequence[str]:
    """full_attention or sliding_attention for each layer: `layer_types`, checked, or the default where it is absent."""
    layers = hf.count("num_hidden_layers")
    types = hf.get("layer_types", list, None)
    if types is None:
        return default
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted({str(name) for name in types} - set(known))
    if unknown or len(types) != layers:
        found = f"layer type {', '.join(unknown)}" if unknown else f"{len(types)} layer types for {layers} layers"
        raise InputError(f"{hf.where}: layer_types: found {found}; expected one of {', '.join(known)} for each layer")
    if window is None and "sliding_attention" in types:
        raise InputError(
            f"{hf.where}: layer_types has sliding_attention but sliding_window is not set; expected a number of tokens"
        )
    return types


def check_experts(hf: Fields, experts: Experts) -> Experts:
    """The same, or InputError when a token would choose more experts than there are."""
    if experts.chosen > experts.count:
        raise InputError(f"{hf.where}: num_experts_per_tok is {experts.chosen}; expected at most {experts.count}")
    return experts


def read_shared(hf: Fields, *, kv_heads: int | None, head_dim: int | None) -> dict[str, Any]:
    """The ModelConfig fields that all families read alike; `kv_heads` and `head_dim` are the family's defaults."""
    act_key = "hidden_activation" if "hidden_activation" in hf else "hidden_act"
    activation = hf.get(act_key, str, "silu")
    if activation not in ACTIVATIONS:
        raise InputError(f"{hf.where}: {act_key} {activation!r} is not supported; supported: {', '.join(ACTIVATIONS)}")
    if hf.get("attention_dropout", float, 0.0):
        log.warning(
            "%s: attention_dropout %s is not applied; training runs without it", hf.where, hf.hf["attention_dropout"]
        )
    width, heads = hf.count("hidden_size"), hf.count("num_attention_heads")
    if head_dim is None and "head_dim" not in hf and width % heads:
        raise InputError(
            f"{hf.where}: hidden_size {width} is not a multiple of num_attention_heads {heads}; set head_dim"
        )
    if kv_heads is None or "num_key_value_heads" in hf.hf:  # null says as many as there are heads
        kv_heads = heads
    num_kv_heads = hf.count("num_key_value_heads", kv_heads)
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
    keys = write_layer_types(config)
    return {"use_sliding_window": keys["sliding_window"] is not None} | keys
