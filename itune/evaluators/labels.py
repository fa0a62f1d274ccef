"""Where an item comes from and what it is counted under: category, source, group, and the task it belongs to."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from itune.config import Config, EvalSection
from itune.data.census import lacking


def labels(row: Any, config: Config, number: int) -> dict[str, Any]:
    """Of a Conversation or Example: category (`eval.by`), cluster (`data.held_out_by`), source and `eval.groups`."""
    metadata, by_task = row.metadata, config.data.held_out_by
    groups = {field: str(metadata[field]) for field in config.eval.groups if metadata.get(field) not in (None, "")}
    return {
        "address": str(row.address),
        "category": str(metadata.get(config.eval.by, "unknown")),
        "cluster": str(metadata[by_task]) if by_task in metadata else f"item {number}",
        "source": row.address.source,
        "groups": groups,
    }


def lacking_labels(config: Config, rows: Sequence[Any]) -> list[str]:
    """A warning for each field that `eval.by` or `eval.groups` names and no held-out row has."""
    by = [] if config.eval.by == EvalSection().by else [config.eval.by]
    return lacking(rows, {"eval.by": by, "eval.groups": config.eval.groups}, "held-out row") if rows else []


def broken_down(items: Sequence[Mapping[str, Any]], summarise: Callable[[list[int]], Any]) -> dict[str, Any]:
    """`summarise` of the positions of the items of each category, of each source where there are several, and of each
    value of each group's field: {"categories": {...}, "sources": {...}, "groups": {field: {...}}}.
    """
    result: dict[str, Any] = {"categories": _each(items, summarise, lambda item: item["category"])}
    if len({item.get("source") for item in items}) > 1:
        result["sources"] = _each(items, summarise, lambda item: item["source"])
    fields = sorted({field for item in items for field in item.get("groups", {})})
    if fields:
        result["groups"] = {
            field: _each(items, summarise, lambda item, field=field: item["groups"].get(field)) for field in fields
        }
    return result


def _each(items: Sequence[Mapping[str, Any]], summarise: Callable[[list[int]], Any], key: Callable[..., Any]
          ) -> dict[str, Any]:  # fmt: skip
    places: dict[str, list[int]] = defaultdict(list)
    for place, item in enumerate(items):
        if (value := key(item)) is not None:
            places[str(value)].append(place)
    return {name: summarise(places[name]) for name in sorted(places)}
