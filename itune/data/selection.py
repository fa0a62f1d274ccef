"""Sources -> conversations to train on and to hold out: reading, the split, the filters, and what gives an item away.

Nothing here needs a tokenizer: `itune data split` is this and no more, and training renders in between.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from itune.data import heldout, quality
from itune.data.categories import Category, categorise
from itune.data.findings import Finding
from itune.data.formats import SIGNS, check_fields, convert, detect_format
from itune.data.sources import Row, Source, open_sources
from itune.data.split import Split, hold_out
from itune.types import Conversation, InputError, Message

ASKS = ("question", "prompt", "instruction", "problem", "query", "input", "text", "goal", "ctx")


def conversations(section: Any, sources: list[Source]) -> Iterator[Conversation]:
    """Every row of the sources as a conversation, each source in its own format, at most `limit` rows of each."""
    check_fields(section.fields)
    for source in sources:
        rows = source.rows()
        first = list(itertools.islice(rows, 8))
        if not first:
            raise InputError(f"{source.spec}: no rows; expected at least one")
        name = section.format if section.format != "auto" else detect_format(first, section.fields)
        all_rows: Iterator[Row] = itertools.chain(first, rows)
        for row in itertools.islice(all_rows, section.limit or None):
            yield _of_its_source(convert(row, name, section.fields), section.source_field)


def _of_its_source(conversation: Conversation, field: str) -> Conversation:
    """The conversation under the source that its own field names, where `data.source_field` says so."""
    if not field:
        return conversation
    if field not in conversation.metadata:
        found = ", ".join(conversation.metadata) or "none"
        raise InputError(f"{conversation.address}: {field}: missing, and data.source_field names it; "
                         f"other fields of the row: {found}")
    address = dataclasses.replace(conversation.address, source=str(conversation.metadata[field]))
    return dataclasses.replace(conversation, address=address)


@dataclasses.dataclass(frozen=True)
class Selection:
    """rows: the training side of the split, with `categories` and what the filters found. held: the other side.

    split: how it was split, as the proof states it.
    """

    rows: list[Conversation]
    held: list[Conversation]
    split: dict[str, Any]
    quality: quality.QualityReport
    categories: list[Category]


def select(section: Any, sources: list[Source], eval_sources: list[Source], seed: int) -> Selection:
    """Read everything, split it, and run the filters over the training side. Raises InputError for bad input."""
    rows = list(conversations(section, sources))
    split = Split(section.held_out_by, section.held_out_share, seed) if section.held_out_share else None
    held, told = hold_out(rows, conversations(section, eval_sources), split)
    told["from_training_sources"] = {}
    if split is not None:
        for row in rows:
            if split.holds_out(row):
                counts = told["from_training_sources"]
                counts[row.address.source] = counts.get(row.address.source, 0) + 1
        rows = [row for row in rows if not split.holds_out(row)]
    held = [_labelled(row, found, section.category_field) for row, found in zip(held, _categories(section, held))]
    found = quality.check(rows, dataclasses.asdict(section.quality), predicate=section.predicate,
                          near_duplicate=section.near_duplicate)  # fmt: skip
    return Selection(rows, held, told, found, _categories(section, rows))


def _categories(section: Any, rows: Sequence[Conversation]) -> list[Category]:
    return categorise(rows, section.category_field, section.categories)


def _labelled(row: Conversation, category: Category, field: str) -> Conversation:
    """A held-out row that has no label of its own gets the category, so that results can be broken down by it."""
    if not field or row.metadata.get(field):
        return row
    return dataclasses.replace(row, metadata={**row.metadata, field: category.name})


@dataclasses.dataclass(frozen=True)
class Cleared:
    """What may be trained on and judged by, as indices; what was removed and why; the proof; benchmarks by name."""

    train: list[int]
    held: list[int]
    findings: list[Finding]
    proof: dict[str, Any]
    benchmarks: dict[str, dict[str, Any]]


def clear(section: Any, rows: Sequence[Conversation], held: Sequence[Conversation]) -> Cleared:
    """Remove from the rows what matches a benchmark, then what matches a held-out item (or the item, if so chosen).

    The findings that concern held-out items have the filter `held_out`. The proof is over what is left.
    """
    thresholds = {"grams": section.overlap_grams, "cosine": section.overlap_cosine}
    kept, findings, benchmarks = list(range(len(rows))), [], {}
    for source in open_sources(section.benchmarks, "data.benchmarks") if section.benchmarks else []:
        items = list(_questions(source, section.limit))
        result = heldout.decontaminate([rows[i] for i in kept], items, **thresholds)
        findings += [dataclasses.replace(f, filter="benchmark", index=kept[f.index], detail=source.name)
                     for f in result.findings]  # fmt: skip
        hit = len({found.other for found in result.findings})
        benchmarks[source.name] = {"items": len(items), "items_matched": hit, "rows_removed": len(result.findings)}
        kept = [kept[i] for i in result.train]
    result = heldout.decontaminate([rows[i] for i in kept], held, remove=section.overlap_removes, **thresholds)
    if section.overlap_removes == "train":
        findings += [dataclasses.replace(f, index=kept[f.index]) for f in result.findings]
    else:
        findings += [dataclasses.replace(f, filter="held_out") for f in result.findings]
    return Cleared([kept[i] for i in result.train], list(result.held_out), findings, result.proof, benchmarks)


def _questions(source: Source, limit: int) -> Iterator[Conversation]:
    """The prompts of a benchmark's rows, whatever shape they have."""
    for row in itertools.islice(source.rows(), limit or None):
        name = next((name for name, signs in SIGNS.items() if all(sign in row.fields for sign in signs)), None)
        asked = next((key for key in ASKS if isinstance(row.fields.get(key), str)), None)
        if name in ("messages", "sharegpt"):
            yield convert(row, name)
        elif asked:
            text = f"{row.fields[asked]}\n{row.fields.get('input') or ''}" if name == "alpaca" else row.fields[asked]
            yield Conversation((Message("user", text.strip()),), row.address)
        else:
            raise InputError(f"{row.address}: no field with a question (fields: {', '.join(row.fields)}); expected "
                             f"messages, or one of {', '.join(ASKS)}")
