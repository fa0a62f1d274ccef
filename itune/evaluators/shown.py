"""Numbers of an evaluation as lines of text: never a rate without its interval and the number of items behind it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

SHOWN = 12  # parts of a breakdown
FIRST = ("score", "loss", "accuracy", "exact", "rouge_l", "stopped", "n")  # what one line of a log has room for


def bounds(summary: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95 % interval of a number of a summary, None where it has none."""
    low, high = summary.get(f"{name}_low"), summary.get(f"{name}_high")
    if name == "score" and low is None:
        low, high = summary.get("low"), summary.get("high")
    return None if low is None or high is None else (float(low), float(high))


def is_bound(name: str) -> bool:
    return name in ("low", "high") or name.endswith(("_low", "_high"))


def number(summary: Mapping[str, Any], name: str) -> str:
    """A number with its interval: `0.41 (0.35 to 0.48)`."""
    found = bounds(summary, name)
    value = summary[name]
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return text if found is None else f"{text} ({found[0]:.4g} to {found[1]:.4g})"


def brief(summary: Mapping[str, Any], most: int = 4) -> str:
    """The main numbers of a summary on one line; all are in its file."""
    numbers = [name for name, value in summary.items() if _numeric(value) and not is_bound(name)]
    chosen = [name for name in FIRST if name in numbers] or numbers
    if not chosen:  # a summary of parts, such as of several tasks
        return "; ".join(f"{name}: {brief(part, 2)}" for name, part in summary.items() if isinstance(part, Mapping))
    return ", ".join(f"{name} {number(summary, name)}" for name in chosen[:most])


def lines(summary: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The numbers of a summary with their paths, one a line; of a breakdown the largest parts, one a line."""
    for name, value in summary.items():
        path = f"{prefix}/{name}"
        if isinstance(value, Mapping) and name in ("categories", "sources"):
            yield from breakdown(value, path)
        elif isinstance(value, Mapping) and name == "groups":
            for field, parts in value.items():
                yield from breakdown(parts, f"{path}/{field}")
        elif isinstance(value, Mapping):
            yield from lines(value, path)
        elif _numeric(value) and not is_bound(name):
            yield f"{path}  {number(summary, name)}"


def largest(parts: Mapping[str, Any]) -> list[str]:
    """The names of the parts of a breakdown with the most items, as many as are shown, in their own order."""
    by_size = sorted(parts, key=lambda name: -parts[name].get("n", 0))[:SHOWN]
    return [name for name in parts if name in by_size]


def unseen(parts: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """A line that counts the parts that are not shown, if any."""
    if len(parts) > SHOWN:
        yield f"{prefix}: {len(parts) - SHOWN} smaller ones are in the files and in `itune report`"


def breakdown(parts: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """The main numbers of the largest parts, one a line."""
    yield from (f"{prefix}/{name}  {brief(parts[name])}" for name in largest(parts))
    yield from unseen(parts, prefix)


def paired_lines(found: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """What a paired comparison says, overall and by category, or why there is none."""
    if found.get("refused"):
        yield f"{prefix}: not compared: {found['refused']}"
    if not found.get("n"):
        return
    by = f" (score: {found['score_by']})" if "score_by" in found else ""
    yield f"{prefix}{by}: {paired_line(found)}"
    parts = found.get("categories", {})
    if len(parts) > 1:
        yield from (f"{prefix}/{name}: {paired_line(parts[name])}" for name in largest(parts))
        yield from unseen(parts, prefix)


def paired_line(found: Mapping[str, Any]) -> str:
    """One comparison: both numbers, their difference, who won, and what could not have been seen."""
    text = (f"base {number(found, 'base')}, tuned {number(found, 'tuned')}, difference {number(found, 'difference')}; "
            f"{found['wins']} won, {found['losses']} lost, {found['ties']} tied of {found['n']}")
    if not found["sure"]:
        text += "; no difference shown"
        if "detectable" in found:
            text += f" (only one of {found['detectable']:.2g} or more would have been)"
    return text


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
