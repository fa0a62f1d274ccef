"""Tables of an evaluation: every number with its interval, the comparison in pairs, and plain trees of settings."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from itune.evaluators import shown
from itune.report.charts import forest

PARTS = ("categories", "sources", "groups")
RATES = ("score", "accuracy", "exact", "normalized", "rouge_l", "stopped", "repetition", "refused_harmful",
         "refused_harmless", "precision", "recall", "acc", "acc_norm", "exact_match")  # fmt: skip
DASH = "\u2013"
Column = tuple[str, Mapping[str, Any]]  # heading, summary of one evaluator


def cell(summary: Mapping[str, Any], name: str) -> str:
    """A table cell with the number, its interval below it."""
    value = summary.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return f'<td class="number dim">{DASH}</td>'
    bounds = shown.bounds(summary, name)
    share = is_rate(name, value) and bounds is not None
    return f'<td class="number">{_shown(value, share)}{_bounds(bounds, share)}</td>'


def is_rate(name: str, value: float) -> bool:
    """Shown in percent: a share of items; a name outside `RATES` stays a plain number."""
    return name.partition("(")[0] in RATES and 0 <= value <= 1


def _shown(value: float, share: bool, sign: bool = False) -> str:
    plus = "+" if sign else ""
    if share:  # a difference of percentages is in points
        return f"{100 * value:{plus}.1f} {'points' if sign else '%'}"
    return f"{value:{plus},}" if isinstance(value, int) else f"{value:{plus}.4g}"


def _bounds(bounds: tuple[float | None, float | None] | None, share: bool, sign: bool = False) -> str:
    """The interval in small letters, the unit said once; "" where it is not known."""
    if bounds is None or bounds[0] is None or bounds[1] is None:
        return ""
    low, high = (_shown(end, share, sign) for end in bounds if end is not None)
    return f"<small>{low.split(' ')[0]} to {high}</small>"


def evaluation_table(columns: Sequence[Column]) -> str:
    """One evaluator: a row for each number, a column for each evaluation."""
    names = dict.fromkeys(path for _, summary in columns for path in _numbers(summary))
    head = "".join(f'<th class="number">{html.escape(title)}</th>' for title, _ in columns)
    rows = []
    for path in names:
        cells = "".join(cell(_at(summary, path[:-1]), path[-1]) for _, summary in columns)
        rows.append(f"<tr><th>{html.escape(' / '.join(path))}</th>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(rows)}</table></div>'


def _numbers(summary: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the numbers outside the breakdowns; bounds stand below their numbers."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            if name not in PARTS:
                yield from _numbers(value, (*prefix, name))
        elif isinstance(value, int | float) and not isinstance(value, bool) and not shown.is_bound(name):
            yield (*prefix, name)


def _at(summary: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for name in path:
        summary = summary.get(name, {})
    return summary


def parts(found: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(kind, name, part) of every breakdown of a summary or comparison."""
    for kind in ("categories", "sources"):
        values = found.get(kind, {})
        for name in values if len(values) > 1 else ():
            yield {"categories": "category", "sources": "source"}[kind], name, values[name]
    for field, values in found.get("groups", {}).items():
        for name in values:
            yield field, name, values[name]


def parts_table(summary: Mapping[str, Any]) -> str:
    """The breakdown of one evaluation: a row for each category, source and group, a column for each number."""
    found = list(parts(summary))
    names = dict.fromkeys(path[0] for _, _, part in found for path in _numbers(part) if len(path) == 1)
    head = "".join(f'<th class="number">{html.escape(name)}</th>' for name in names)
    rows = "".join(
        f'<tr><td><span class="label">{html.escape(kind)}</span> {html.escape(name)}</td>'
        f"{''.join(cell(part, column) for column in names)}</tr>" for kind, name, part in found
    )
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{rows}</table></div>'


def paired_table(found: Mapping[str, Any], names: tuple[str, str] = ("base", "tuned")) -> str:
    """The comparison over all items and by category, source and group, each difference drawn with its interval."""
    rows = [("", "all", found), *parts(found)]
    scored = "detectable" in found
    share = scored
    ends = [abs(part[f"difference{end}"] or 0) for _, _, part in rows for end in ("", "_low", "_high")]
    limit = max((end for end in ends if math.isfinite(end)), default=0.0)
    limit = min(1.0, limit) if scored else limit
    titles = ("won / lost / tied", *names, "items", *(["smallest shown"] if scored else []))
    head = "".join(f'<th class="number">{html.escape(title)}</th>' for title in titles)
    body = []
    for kind, name, part in rows:
        numbers = {}
        for key in ("base", "tuned", "difference"):
            bounds, sign = (part[f"{key}_low"], part[f"{key}_high"]), key == "difference"
            numbers[key] = f'<td class="number">{_shown(part[key], share, sign)}{_bounds(bounds, share, sign)}</td>'
        drawn = forest(part["difference"], part["difference_low"], part["difference_high"], limit, part["sure"])
        label = f'<span class="label">{html.escape(kind)}</span> ' if kind else ""
        smallest = f'<td class="number">{_shown(part["detectable"], share, True).lstrip("+")}</td>' if scored else ""
        body.append(
            f'<tr><td>{label}{html.escape(name)}</td>'
            f'{numbers["difference"]}<td>{drawn}</td><td class="number"><span class="good">{part["wins"]}</span> / '
            f'<span class="bad">{part["losses"]}</span> / {part["ties"]}</td>{numbers["base"]}{numbers["tuned"]}'
            f'<td class="number">{part["n"]}<small>{part["clusters"]} tasks</small></td>{smallest}</tr>'
        )
    top = f'<tr><th></th><th class="number">difference</th><th></th>{head}</tr>'
    return f'<div class="scroll"><table>{top}{"".join(body)}</table></div>'


def tree_table(tree: Mapping[str, Any]) -> str:
    """Nested settings as rows of path and value."""
    rows = "".join(f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in leaves(tree))
    return f'<div class="scroll"><table class="tree">{rows}</table></div>'


def difference_table(one: Mapping[str, Any], other: Mapping[str, Any], names: tuple[str, str]) -> str:
    """The settings that differ; a sentence where none does."""
    rows = differences(one, other)
    if not rows:
        return '<p class="dim">No difference.</p>'
    head = f'<tr><th></th><th class="one">{html.escape(names[0])}</th><th class="two">{html.escape(names[1])}</th></tr>'
    body = "".join(f"<tr><th>{html.escape(key)}</th><td>{html.escape(a)}</td><td>{html.escape(b)}</td></tr>"
                   for key, a, b in rows)  # fmt: skip
    return f'<div class="scroll"><table class="tree">{head}{body}</table></div>'


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(path, value there, value here) of every leaf that differs; a missing one is shown as a dash."""
    left, right = dict(leaves(one)), dict(leaves(other))
    keys = dict.fromkeys([*left, *right])
    return [(key, left.get(key, DASH), right.get(key, DASH)) for key in keys if left.get(key) != right.get(key)]


def leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found += leaves(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", value if isinstance(value, str) else _text(value)))
    return found


def _text(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} ... ({len(text):,} characters)"
