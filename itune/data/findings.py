"""What a filter found: one record a row and reason, with addresses, and the file of what was removed.

Filters never delete. They return findings; the caller decides by action what to drop, and writes every dropped row with
its reasons to `rejects.jsonl`.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from itune.types import Conversation
from itune.writers import write_atomically


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


def write_findings(path: str | os.PathLike, findings: Iterable[Finding], dropped: Collection[int]) -> None:
    """Write every finding as a JSON line, with what became of its row."""
    lines = (json.dumps(found.to_dict() | {"row": "dropped" if found.index in dropped else "kept"}) + "\n"
             for found in findings)  # fmt: skip
    write_atomically(Path(path), lines)


def write_rejects(
    path: str | os.PathLike, conversations: Sequence[Conversation], dropped: Iterable[int],
    findings: Iterable[Finding], append: bool = False,
) -> int:
    """Write the dropped rows as JSON lines: address, source, reason, reasons, messages, metadata. Returns how many.

    Secrets and personal data are masked. A file that is not appended to appears whole or not at all.
    """
    from itune.data import privacy

    gone = set(dropped)
    reasons: dict[int, list[dict]] = {index: [] for index in gone}
    for found in findings:
        if found.index in gone:
            reasons[found.index].append(found.to_dict())
        if found.filter == "contradiction" and found.other in gone:
            reasons[found.other].append(found.to_dict() | {"address": found.other_address, "other": found.address})
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target if append else target.with_name(target.name + f".partial{os.getpid()}")
    with partial.open("a" if append else "w", encoding="utf-8", errors="backslashreplace") as file:
        for index in sorted(gone):
            row = conversations[index]
            record: dict[str, Any] = {
                "address": str(row.address), "source": row.address.source,
                "reason": reasons[index][0]["reason"] if reasons[index] else "", "reasons": reasons[index],
                "messages": [{"role": m.role, "content": privacy.redact(m.content)} for m in row.messages],
                "metadata": {key: privacy.redact(str(value)) for key, value in row.metadata.items()},
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    if not append:
        os.replace(partial, target)
    return len(gone)
