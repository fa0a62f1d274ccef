#!/usr/bin/env python3
"""Write instruction data with known defects among real rows, to see what `itune data report` finds of them.

    python scripts/plant_defects.py --data a.jsonl.gz b.jsonl --out planted.jsonl [--rate 0.01] [--kinds empty,echo]

Every kind is planted in `--rate` of the rows: some in place, those that concern pairs (duplicates, contradictions) as
further rows. Which rows are defects stands in OUT.truth.jsonl, apart from the rows: line, kind, and the line that the
row was made from. A row without a task gets its file's name as one.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from itune.data import planting
from itune.data.formats import convert, detect_format
from itune.data.sources import open_sources
from itune.types import Conversation

DEFAULT = ("contradiction", "exact_duplicate", "near_duplicate", "empty", "placeholder", "refusal", "truncated",
           "script", "language", "missing_input", "echo", "secret", "personal")  # fmt: skip


def read(paths: list[str], limit: int) -> list[Conversation]:
    """The rows of the files, at most `limit` of each (0 is all)."""
    found = []
    for source in open_sources(paths, "--data"):
        rows = list(source.rows())[: limit or None]
        name = detect_format(rows[:8])
        found += [convert(row, name) for row in rows]
    return found


def plant(rows: list[Conversation], kinds: list[str], rate: float, seed: int) -> tuple[list[Conversation], list[dict]]:
    """Rows with every kind planted, no row twice, and the truth by row."""
    rows, truth, used, wanted = list(rows), {}, set(), rate * len(rows)
    for number, kind in enumerate(kinds):
        free = [index for index in range(len(rows)) if index not in used]
        made = planting.plant([rows[index] for index in free], kind, wanted / len(free), seed + number)
        for place, origin in zip(made.truth, made.origin, strict=True):
            if place < len(free):
                rows[free[place]] = made.conversations[place]
                row = free[place]
            else:
                rows.append(made.conversations[place])
                row = len(rows) - 1
            truth[row] = {"line": row + 1, "kind": kind, "origin": free[origin] + 1}
            used |= {row, free[origin]}
    return rows, [truth[row] for row in sorted(truth)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--kinds", default=",".join(DEFAULT))
    parser.add_argument("--rate", type=float, default=0.01)
    parser.add_argument("--limit", type=int, default=0, help="rows of each file, 0 is all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows, truth = plant(read(given.data, given.limit), given.kinds.split(","), given.rate, given.seed)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8") as file:
        for row in rows:
            messages = [{"role": message.role, "content": message.content} for message in row.messages]
            source = row.address.source
            record = {"messages": messages, "source": source, "task": source, **row.metadata}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    path = given.out.with_suffix(".truth.jsonl")
    path.write_text("".join(json.dumps(each) + "\n" for each in truth))
    print(f"{len(rows):,} rows in {given.out}, {len(truth):,} of them defects: {path}")


if __name__ == "__main__":
    main()
