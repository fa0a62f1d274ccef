"""What a filter found: one record a row and reason, with addresses, and the file of what was removed.

Filters never delete. They return findings; the caller decides by action what to drop, and writes every dropped row with
its reasons to `rejects.jsonl`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from itune.types import Conversation


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that a filter found in a row.

    `index` is the row's place in the sequence that was checked; `other` and `other_address` name the row that it
    duplicates, contradicts or matches (-1 and "" where there is none). `score` is the filter's own measure.
    """

    filter: str
    reason: str
    index: int
    address: str
    detail: str = ""
    score: float = 0.0
    other: int = -1
    other_address: str = ""

    def to_dict(self) -> dict[str, Any]:
        """JSON object without the fields that say nothing."""
        record: dict[str, Any] = {"filter": self.filter, "reason": self.reason, "address": self.address}
        if self.detail:
            record["detail"] = self.detail
        if self.score:
            record["score"] = round(self.score, 4)
        if self.other_address:
            record["other"] = self.other_address
        return record


def finding(filter_name: str, reason: str, index: int, conversation: Conversation, **fields: Any) -> Finding:
    """A Finding at this row's address."""
    return Finding(filter_name, reason, index, str(conversation.address), **fields)


def tally(findings: Iterable[Finding]) -> dict[str, dict[str, int]]:
    """Rows by filter and reason: {"duplicate": {"exact": 12}}. A row counts once for each reason."""
    rows = {(found.filter, found.reason, found.index) for found in findings}
    table: dict[str, dict[str, int]] = {}
    for (name, reason), count in sorted(collections.Counter((name, reason) for name, reason, _ in rows).items()):
        table.setdefault(name, {})[reason] = count
    return table


def write_rejects(
    path: str | os.PathLike, conversations: Sequence[Conversation], dropped: Iterable[int], findings: Sequence[Finding]
) -> int:
    """Write the dropped rows as JSON lines: address, reasons, messages, metadata. Returns how many.

    Secrets and personal data are masked. The file appears whole or not at all.
    """
    from itune.data import privacy

    reasons: dict[int, list[dict]] = {}
    for found in findings:
        reasons.setdefault(found.index, []).append(found.to_dict())
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + f".partial{os.getpid()}")
    rows = sorted(set(dropped))
    with partial.open("w", encoding="utf-8") as file:
        for index in rows:
            row = conversations[index]
            messages = [{"role": m.role, "content": privacy.redact(m.content)} for m in row.messages]
            record: dict[str, Any] = {
                "address": str(row.address), "reasons": reasons.get(index, []), "messages": messages,
            }
            record["metadata"] = {key: privacy.redact(str(value)) for key, value in row.metadata.items()}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    os.replace(partial, target)
    return len(rows)
