"""May this config continue that run? Every key is classified; a difference that matters is refused, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from itune.config import all_keys
from itune.objectives.sft import by_micro_batch

# every section of the config, those inside another one too
SECTIONS = frozenset(key[:end] for key in all_keys() for end, letter in enumerate(key) if letter == ".")
# dotted key or section -> what a change on resume means. The longest match decides; a key that matches none must match.
#   "must": refused. "grow": may become larger, the run is extended. "data": may change as long as the fingerprint of
#   the training data agrees (a file that moved). "may": changes no number, or is meant to change. "rounding": changes
#   results by float32 rounding, so the run is no longer bitwise the uninterrupted one.
CLASSES: dict[str, str] = {
    "train.epochs": "grow",
    "train.max_steps": "grow",
    "train.accumulation": "rounding",
    "train.remat": "rounding",
    "train.deterministic": "rounding",
    "train.max_skipped": "may",
    "train.timeout": "may",
    "loss.chunk": "rounding",
    "loss.blocks": "rounding",
    "model.attention": "rounding",
    "mesh": "rounding",
    "data.train": "data",
    "data.eval": "data",
    "data.format": "data",
    "data.fields": "data",
    "data.novel_min": "may",
    "data.limits": "may",
    "data.cache_dir": "may",
    "data.held_out_by": "data",
    "data.held_out_share": "data",
    "data.chat_template": "data",
    "data.source_field": "data",
    "data.category_field": "data",
    "data.categories": "data",
    "data.group_field": "data",
    "data.rating_field": "data",
    "data.overlap_grams": "data",
    "data.overlap_cosine": "data",
    "data.overlap_removes": "data",
    "data.benchmarks": "data",
    "data.quality": "data",
    "data.near_duplicate": "data",
    "data.predicate": "data",
    "model.path": "data",
    "train.init_from": "may",  # what is frozen is compared with what the run began with, the rest is in the checkpoint
    "lora.init_from": "may",
    "evaluators": "may",
    "checkpoint": "may",
    "eval": "may",
    "log": "may",
    "profile": "may",
}


def classify(key: str) -> str:
    """The class of a dotted config key, as `CLASSES` explains them."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        if (found := CLASSES.get(".".join(parts[:length]))) is not None:
            return found
    return "must"


def compare_configs(
    saved: Mapping[str, Any], now: Mapping[str, Any], same_data: bool = True
) -> tuple[list[str], list[str]]:
    """Differences between the config of a run and the one it is to continue with: (refused, allowed), a line each.

    `same_data` says whether the fingerprint of the training data, tokenizer and template is unchanged.
    """
    refused, allowed = [], []
    old, new = _flat(saved), _flat(now)
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        line, kind = f"{key}: {before!r} there, {after!r} here", classify(key)
        if key == "train.accumulation" and by_micro_batch(new["loss.weighting"], new["loss.router_aux"]):
            kind = "must"  # another objective, not another rounding
        if kind == "must" or (kind == "data" and not same_data):
            refused.append(line)
        elif kind == "grow" and not _grows(before, after):
            refused.append(f"{line} (may only grow)")
        elif kind == "rounding":
            allowed.append(f"{line} (results change by rounding)")
        else:
            allowed.append(line)
    return refused, allowed


def _grows(before: Any, after: Any) -> bool:
    """0 is "not set"; whether the run as a whole became longer is checked with its number of steps."""
    return not before or not after or after >= before


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value. Only sections are entered: a dict that is a value (`data.mixture`) stays one."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and prefix + name in SECTIONS:
            flat.update(_flat(value, f"{prefix}{name}."))
        else:
            flat[prefix + name] = value
    return flat
