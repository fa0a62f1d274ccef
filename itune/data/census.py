"""The numbers of a data set: what became of every row by source, lengths, categories, languages, voices."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from itune.data import annotators, languages, words
from itune.data.categories import table
from itune.data.findings import Finding
from itune.data.store import ExampleStore
from itune.types import Conversation

LOOKED_AT = 2_000  # rows whose language is told, evenly spread: a share is right to about two points
EDGES = (0, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 1 << 20)
PERCENTILES = (5, 25, 50, 75, 95, 99, 100)
_SAID = {"benchmark": "asks what a benchmark asks", "contamination": "asks what a held-out item asks",
         "held_out": "asks what a training row asks"}  # fmt: skip


class Census:
    """Counts of rows by source: every row is kept, held out, or dropped for one reason."""

    def __init__(self) -> None:
        self.sources: dict[str, Counter[str]] = {}
        self.dropped: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()

    def add_rows(self, rows: Sequence[Conversation]) -> None:
        for name, count in Counter(row.address.source for row in rows).items():
            self._of(name)["rows"] += count
            self._of(name)["kept"] += count

    def add_held_out(self, by_source: Mapping[str, int]) -> None:
        """Rows that the split took away from training, which `add_rows` did not see."""
        for name, count in by_source.items():
            self._of(name)["rows"] += count
            self._of(name)["held out"] += count

    def add_cut(self, source: str, parts: int, lost_tokens: int, lost_targets: int) -> None:
        """A row over the maximum length of which something is left."""
        counts = self._of(source)
        counts["split" if parts > 1 else "truncated"] += 1
        counts["truncated_tokens"] += lost_tokens
        counts["lost_targets"] += lost_targets

    def add_drops(self, rows: Sequence[Conversation], dropped: Collection[int], findings: Sequence[Finding]) -> None:
        """Count each dropped row once, under the first thing that was found in it."""
        first: dict[int, Finding] = {}
        for found in findings:
            if found.index in dropped:
                first.setdefault(found.index, found)
        for index in sorted(dropped):
            counts, reason = self._of(rows[index].address.source), label(first.get(index))
            counts["kept"] -= 1
            counts[f"dropped: {reason}"] += 1
            self.dropped[reason] += 1

    def add_examples(self, store: ExampleStore) -> None:
        """Examples and tokens of each source."""
        for number, name in enumerate(store.source_names):
            mine = store.sources == number
            counts = self._of(name)
            counts["examples"] += int(mine.sum())
            counts["tokens"] += int(store.lengths[mine].sum())
            counts["supervised_tokens"] += int(store.supervised[mine].sum())

    def report(self) -> dict[str, Any]:
        totals: Counter[str] = Counter()
        for counts in self.sources.values():
            totals.update(counts)
        names = ("rows", "kept", "examples", "truncated", "split", "truncated_tokens", "lost_targets", "tokens",
                 "supervised_tokens")  # fmt: skip
        return {name: totals[name] for name in names} | {
            "dropped": dict(self.dropped), "notes": dict(self.notes),
            "sources": {name: dict(counts) for name, counts in self.sources.items()},
        }  # fmt: skip

    def _of(self, source: str) -> Counter[str]:
        return self.sources.setdefault(source, Counter())


def label(found: Finding | None) -> str:
    """What a report calls the reason for which a row went."""
    if found is None:
        return "contradiction"  # the other row of a pair
    if found.filter in ("overlong", "empty_turn"):
        return found.reason
    if found.filter == "benchmark":
        return f"{_SAID[found.filter]} ({found.detail})"
    return _SAID.get(found.filter) or found.filter.replace("_", " ")


def describe(section: Any, chosen: Any, store: ExampleStore, dropped: Collection[int]) -> dict[str, Any]:
    """The parts of a report that look into the rows: quality, lengths, categories, languages, voices."""
    rows = chosen.rows
    kept = [index for index in range(len(rows)) if index not in dropped]
    groups = section.group_field
    voices: dict[str, Any] = {}
    named = {"data.group_field": [groups] if groups else [],
             "data.rating_field": [section.rating_field] if section.rating_field else []}  # fmt: skip
    if groups:
        voices["coverage"] = annotators.coverage([rows[i].metadata.get(groups) for i in kept])
    if section.rating_field:
        voices["agreement"] = _plain(annotators.agreement([rows[i] for i in kept], section.rating_field, groups))
    return {
        "quality": chosen.quality.to_dict(),
        "lengths": {"tokens": spread(store.lengths), "supervised": spread(store.supervised)},
        "categories": {
            "by_source": table([chosen.categories[i] for i in kept], [rows[i] for i in kept]),
            "decided_by": dict(Counter(chosen.categories[i].by for i in kept)),
        },
        "languages": spoken([rows[i] for i in kept]),
        "voices": voices, "warnings": lacking([rows[i] for i in kept], named, "training row"),
    }  # fmt: skip


def lacking(rows: Sequence[Conversation], fields: Mapping[str, Sequence[str]], whose: str) -> list[str]:
    """A warning for each field that a config key names and none of the rows (`whose`) has, with the nearest one."""
    if not any(fields.values()):
        return []
    known = sorted({name for row in rows for name, value in row.metadata.items() if value not in (None, "")})
    found = []
    for key, name in ((key, name) for key, names in fields.items() for name in names if name not in known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"nearest: {near[0]}" if near else f"there are {', '.join(known) or 'none'}"
        found.append(f"warning: {key}: no {whose} has a field {name!r} ({hint})")
    return found


def spread(values: np.ndarray) -> dict[str, Any]:
    """Percentiles, and a histogram over doubling bins: counts[i] values lie in [edges[i], edges[i + 1])."""
    if not len(values):
        return {"percentiles": {}, "edges": [], "counts": []}
    last = int(np.searchsorted(EDGES, int(values.max()), side="right")) + 1
    edges = EDGES[:last]
    return {
        "percentiles": {str(p): float(np.percentile(values, p)) for p in PERCENTILES},
        "edges": list(edges), "counts": np.histogram(values, edges)[0].tolist(),
    }  # fmt: skip


def spoken(rows: Sequence[Conversation]) -> dict[str, Any]:
    """Rows by the script of most letters of their answers, and those in Latin script by language, as far as it is told.

    Of many rows, evenly spread ones are looked at.
    """
    step = max(1, len(rows) // LOOKED_AT)
    scripts: Counter[str] = Counter()
    named: Counter[str] = Counter()
    for row in rows[::step]:
        text = "\n".join(turn.response for turn in words.turns(row))[:1000]
        found = {"LATIN": 1} if text.isascii() and any(map(str.isalpha, text)) else languages.scripts(text)
        script = max(found, key=lambda name: found[name]) if found else "none"
        scripts[script] += 1
        if script == "LATIN":
            named[languages.language(text)[0] or "not told"] += 1
    return {"rows_looked_at": len(rows[::step]), "scripts": dict(scripts.most_common()),
            "languages": dict(named.most_common())}  # fmt: skip


def _plain(value: Any) -> Any:
    """JSON has no nan: what cannot be told is None."""
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items()}
    return None if isinstance(value, float) and value != value else value
