"""The data section of a config: what is read, filtered, held out, mixed and limited. `configs/default.py` explains."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal


def key(default: Any, unit: str = "", low: float | None = None, high: float | None = None, low_open: bool = False,
        high_open: bool = False) -> Any:  # fmt: skip
    """A field with its unit and range; `low_open` and `high_open` exclude an end."""
    meta = {"unit": unit, "low": low, "high": high, "low_open": low_open, "high_open": high_open}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=meta)
    return dataclasses.field(default=default, metadata=meta)


Action = Literal["off", "keep", "drop"]


@dataclasses.dataclass(frozen=True)
class QualitySection:
    """One key a filter: `off` does not look, `keep` counts and lists what is found, `drop` removes it too."""

    exact_duplicate: Action = key("keep", "action")
    near_duplicate: Action = key("keep", "action")
    contradiction: Literal["off", "keep", "drop", "majority"] = key("keep", "action")
    empty: Action = key("keep", "action")
    placeholder: Action = key("keep", "action")
    refusal: Action = key("keep", "action")
    truncated: Action = key("keep", "action")
    script: Action = key("keep", "action")
    language: Action = key("keep", "action")
    missing_input: Action = key("keep", "action")
    echo: Action = key("keep", "action")
    secret: Action = key("keep", "action")
    personal: Action = key("keep", "action")
    predicate: Action = key("drop", "action")


@dataclasses.dataclass(frozen=True)
class LimitsSection:
    """What the data must keep to; 1.0 as a highest share and 0 as a lowest number ask for nothing."""

    duplicates: float = key(1.0, "highest share of rows", 0.0, 1.0)
    contradictions: float = key(1.0, "highest share of rows", 0.0, 1.0)
    broken: float = key(1.0, "highest share of rows", 0.0, 1.0)
    secrets: float = key(1.0, "highest share of rows", 0.0, 1.0)
    personal: float = key(1.0, "highest share of rows", 0.0, 1.0)
    contamination: float = key(1.0, "highest share of rows", 0.0, 1.0)
    dropped: float = key(1.0, "highest share of rows", 0.0, 1.0)
    lost_tokens: float = key(1.0, "highest share of tokens", 0.0, 1.0)
    unknown_category: float = key(1.0, "highest share of rows", 0.0, 1.0)
    supervised: float = key(0.0, "lowest share of tokens", 0.0, 1.0)
    examples: int = key(0, "lowest number", 0)
    effective_groups: float = key(0.0, "lowest number", 0.0)


@dataclasses.dataclass(frozen=True)
class DataSection:
    train: str | tuple | dict = key("", "file, folder, glob, dataset id, or several")
    eval: str | tuple | dict = key("", "like data.train")
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = key("auto", "name")
    fields: dict = key({}, "ours -> theirs")
    limit: int = key(0, "rows a source", 0)
    source_field: str = key("", "field of a row")
    category_field: str = key("category", "field of a row")
    categories: dict = key({}, "source -> category")
    group_field: str = key("", "field of a row")
    rating_field: str = key("", "field of a row")
    held_out_by: str = key("", "field of a row")
    held_out_share: float = key(0.0, "share of groups", 0.0, 0.9)
    novel_min: int = key(0, "prompts", 0)
    overlap_grams: float = key(0.5, "share of a prompt's words, 1 is off", 0.0, 1.0, low_open=True)
    overlap_cosine: float = key(0.8, "similarity, 1 is off", 0.0, 1.0, low_open=True)
    overlap_removes: Literal["train", "held_out"] = key("train", "side")
    benchmarks: str | tuple | dict = key("", "like data.train")
    quality: QualitySection = dataclasses.field(default_factory=QualitySection)
    near_duplicate: float = key(0.7, "similarity", 0.3, 1.0)
    predicate: str = key("", "package.module:function")
    limits: LimitsSection = dataclasses.field(default_factory=LimitsSection)
    max_length: int = key(1024, "tokens", 8)
    overlong: Literal["drop", "truncate", "split", "keep_start"] = key("drop", "policy")
    packing: bool = key(True, "yes or no")
    chat_template: str = key("", "name or file")
    train_on: Literal["assistant", "last", "all"] = key("assistant", "which turns")
    source_weights: dict = key({}, "source -> factor")
    mixture: dict = key({}, "source -> weight")
    counts: dict = key({}, "source -> rows or passes")
    cap: int = key(0, "rows a source, 0 is off", 0)
    temperature: float = key(0.0, "exponent 1/T, 0 is off", 0.0)
    balance: dict = key({}, "category -> share")
    max_repeats: float = key(0.0, "passes over a source, 0 is off", 0.0)
    draws: int = key(0, "examples an epoch", 0, 10**9)
    cache_dir: str = key("", "folder")
