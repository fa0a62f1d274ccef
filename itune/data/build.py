"""Sources -> a folder of rendered examples and a report: what `dataset.prepare` does when its cache has no answer."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from itune.data.formats import check_fields, convert, detect_format
from itune.data.render import render_many, truncated
from itune.data.sources import Row, Source
from itune.data.split import Leaks, Split, hold_out
from itune.data.store import Writer, conversation_to_json, hash_of
from itune.data.templates import Tokenizer
from itune.types import Address, Conversation, Example, InputError, Message

CHUNK = 256  # conversations that are encoded as one batch


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
            yield convert(row, name, section.fields)


def build(folder: Path, section: Any, sources: list[Source], eval_sources: list[Source], tokenizer: Tokenizer,
          seed: int, inputs: Mapping[str, Any], log: Callable[[str], None]) -> None:  # fmt: skip
    """Write a cache folder under another name, then give it its own: it is whole or absent.

    `inputs` is what the fingerprint covers. Raises InputError for bad input with its address, and where fewer held-out
    prompts remain than `novel_min`.
    """
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.writing-", dir=folder.parent))
    try:
        split = Split(section.held_out_by, section.held_out_share, seed) if section.held_out_share else None
        held, proof = hold_out(lambda: conversations(section, sources), conversations(section, eval_sources), split)
        leaks = Leaks(held, proof)
        with open(temporary / "rejects.jsonl", "w", encoding="utf-8") as rejects:
            part = _Part(temporary / "held_out", section, tokenizer, rejects, keep=temporary / "held_out.jsonl")
            for conversation in held:
                part.add(conversation)
            held_report, held_digest = part.close()
            prompts = Leaks(part.kept, {}).proof["held_out_prompts"]
            proof |= {"items": held_report["kept"], "prompts": prompts}
            if prompts < section.novel_min:
                raise InputError(f"data.novel_min: {prompts} different held-out prompts remain; expected at least "
                                 f"{section.novel_min}; raise data.held_out_share or add data.eval")
            part = _Part(temporary / "train", section, tokenizer, rejects)
            for conversation in conversations(section, sources):
                if split is not None and split.holds_out(conversation):
                    part.count(conversation, "held out")
                elif leaks.found_in(conversation):
                    part.drop(conversation.address, "asks what a held-out item asks")
                else:
                    part.add(conversation)
            report, digest = part.close()
        report |= {"held_out": proof | {"report": held_report}, "inputs": dict(inputs)}
        fingerprint = hash_of({**inputs, "train": digest, "held_out": held_digest})
        (temporary / "dataset.json").write_text(json.dumps({"report": report, "fingerprint": fingerprint}))
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    drops = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
    log(f"data: {report['rows']:,} rows -> {report['kept']:,} examples, {report['tokens']:,} tokens "
        f"({report['supervised_tokens']:,} supervised), left out: {drops}; {time.monotonic() - started:.1f} s")


class _Part:
    """Renders conversations chunk by chunk into a store, and counts. With `keep`, the conversations are stored too."""

    def __init__(self, folder: Path, section: Any, tokenizer: Tokenizer, rejects: Any, keep: Path | None = None):
        self._writer, self._section, self._tokenizer, self._rejects = Writer(folder), section, tokenizer, rejects
        self._waiting: list[Conversation] = []
        self._keep = open(keep, "w", encoding="utf-8") if keep else None  # noqa: SIM115 (closed by close())
        self.kept: list[Conversation] = []
        self._sources: dict[str, Counter[str]] = {}
        self._dropped: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def count(self, conversation: Conversation, what: str) -> None:
        counts = self._sources.setdefault(conversation.address.source, Counter())
        counts["rows"] += 1
        counts[what] += 1

    def drop(self, address: Address, reason: str) -> None:
        counts = self._sources.setdefault(address.source, Counter())
        counts["rows"] += 1
        self._reject(address, reason)

    def add(self, conversation: Conversation) -> None:
        if any(_is_empty_turn(message) for message in conversation.messages):
            self.drop(conversation.address, "empty assistant turn")
            return
        self._sources.setdefault(conversation.address.source, Counter())["rows"] += 1
        self._waiting.append(conversation)
        if len(self._waiting) >= CHUNK:
            self._flush()

    def close(self) -> tuple[dict[str, Any], str]:
        """(report, digest of the examples)."""
        self._flush()
        digest = self._writer.close()
        if self._keep:
            self._keep.close()
        totals: Counter[str] = Counter()
        for counts in self._sources.values():
            totals.update(counts)
        names = ("rows", "kept", "truncated", "truncated_tokens", "tokens", "supervised_tokens")
        report: dict[str, Any] = {name: totals[name] for name in names}
        report |= {"dropped": dict(self._dropped), "notes": dict(self._notes),
                   "sources": {name: dict(counts) for name, counts in self._sources.items()}}  # fmt: skip
        return report, digest

    def _flush(self) -> None:
        outcomes = render_many(self._waiting, self._tokenizer, self._section.train_on)
        for conversation, outcome in zip(self._waiting, outcomes):
            if outcome.error is not None:
                raise outcome.error
            assert outcome.example is not None
            self._notes.update(outcome.notes)
            self._finish(conversation, outcome.example)
        self._waiting = []

    def _finish(self, conversation: Conversation, example: Example) -> None:
        counts = self._sources[conversation.address.source]
        limit = self._section.max_length
        if len(example.token_ids) > limit:
            if self._section.overlong == "drop":
                self._reject(conversation.address, f"longer than data.max_length ({limit} tokens)")
                return
            cut = truncated(example, limit)
            if cut is None:
                self._reject(conversation.address, f"no target within data.max_length ({limit} tokens)")
                return
            counts["truncated"] += 1
            counts["truncated_tokens"] += len(example.token_ids) - limit
            example = cut
        self._writer.add(example)
        counts["kept"] += 1
        counts["tokens"] += len(example.token_ids)
        counts["supervised_tokens"] += int((example.loss_weights[1:] != 0).sum())
        if self._keep:
            self.kept.append(conversation)
            self._keep.write(json.dumps(conversation_to_json(conversation)) + "\n")

    def _reject(self, address: Address, reason: str) -> None:
        self._sources[address.source][f"dropped: {reason}"] += 1
        self._dropped[reason] += 1
        self._rejects.write(json.dumps({"address": str(address), "source": address.source, "reason": reason}) + "\n")


def _is_empty_turn(message: Message) -> bool:
    if message.role != "assistant" or message.weight == 0 or message.content.strip():
        return False
    return not any(message.extra.get(name) for name in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
