"""A config's data section -> rendered examples on disk, with a report of every row that went in and what became of it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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

from itune.data.formats import convert, detect_format
from itune.data.render import as_tokenizer, render_many, truncated
from itune.data.sources import Row, Source, open_sources
from itune.data.split import Leaks, Split, hold_out
from itune.data.store import ExampleStore, Writer, read_store
from itune.data.templates import Tokenizer, require_template
from itune.types import Address, Conversation, InputError, Message, RunError

CHUNK = 256  # conversations that are encoded as one batch


@dataclasses.dataclass
class Dataset:
    """What training and evaluation read. `held_out[i]` is the rendering of `held_out_conversations[i]`.

    report: rows in and out by source, drops with reasons, tokens, the held-out proof. fingerprint: hash of inputs and content.
    """

    train: ExampleStore
    held_out: ExampleStore
    held_out_conversations: list[Conversation]
    report: dict[str, Any]
    fingerprint: str
    folder: Path

    def rejects(self) -> Iterator[dict[str, str]]:
        """Each row that was left out: {"address", "reason"}."""
        with open(self.folder / "rejects.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def prepare(section: Any, tokenizer: Any, seed: int = 0, log: Callable[[str], None] = print) -> Dataset:
    """Read, convert, split, render and filter what a DataSection names, or open what an earlier call with the same inputs left.

    Processes on one machine share the work: one renders, the others wait and read its files. Raises InputError for bad input
    with its address, and RunError where the cache folder cannot be written.
    """
    tokenizer = as_tokenizer(tokenizer)
    require_template(tokenizer)
    sources = open_sources(section.train, "data.train")
    eval_sources = open_sources(section.eval, "data.eval") if section.eval else []
    inputs = _inputs(section, sources, eval_sources, tokenizer, seed)
    key = _hash({**inputs, "code": _code_digest()})
    folder = cache_folder(section.cache_dir) / key[:32]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_suffix(".lock")):
            dataset = _open(folder, log)
            if dataset is not None:
                log(f"data: {dataset.report['kept']:,} examples from the cache in {folder}")
            else:
                _build(folder, section, sources, eval_sources, tokenizer, seed, inputs, log)
                dataset = _open(folder, log)
    except OSError as error:
        raise RunError(f"data.cache_dir: {folder.parent} cannot be written: {error}; expected a writable folder with space") from error
    if dataset is None:
        raise RunError(f"data.cache_dir: {folder} does not hold what was just written to it; expected a sound disk")
    return dataset


def cache_folder(cache_dir: str = "") -> Path:
    """Where tokenised data is kept: `cache_dir`, or `itune/data` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "itune" / "data"


def conversations(section: Any, sources: list[Source]) -> Iterator[Conversation]:
    """Every row of the sources as a conversation, each source in its own format, at most `limit` rows of each."""
    for source in sources:
        rows = source.rows()
        first = list(itertools.islice(rows, 8))
        if not first:
            raise InputError(f"{source.spec}: no rows; expected at least one")
        name = section.format if section.format != "auto" else detect_format(first, section.fields)
        all_rows: Iterator[Row] = itertools.chain(first, rows)
        for row in itertools.islice(all_rows, section.limit or None):
            yield convert(row, name, section.fields)


def _build(folder: Path, section: Any, sources: list[Source], eval_sources: list[Source], tokenizer: Tokenizer, seed: int,
           inputs: Mapping[str, Any], log: Callable[[str], None]) -> None:  # fmt: skip
    """Write a cache folder under another name, then give it its own."""
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
            held_prompts = Leaks(part.kept_conversations, {}).proof["held_out_prompts"]
            proof |= {"items": held_report["kept"], "prompts": held_prompts}
            if held_prompts < section.novel_min:
                raise InputError(f"data.novel_min: {held_prompts} held-out prompts remain, expected at least {section.novel_min}; "
                                 "raise data.held_out_share or add data.eval")
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
        fingerprint = _hash({**inputs, "train": digest, "held_out": held_digest})
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
    """Renders conversations chunk by chunk into a store, and counts."""

    def __init__(self, folder: Path, section: Any, tokenizer: Tokenizer, rejects: Any, keep: Path | None = None):
        self._writer, self._section, self._tokenizer, self._rejects = Writer(folder), section, tokenizer, rejects
        self._waiting: list[Conversation] = []
        self._keep = open(keep, "w", encoding="utf-8") if keep else None
        self.kept_conversations: list[Conversation] = []
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
        names = ("rows", "kept", "truncated", "tokens", "supervised_tokens")
        report = {name: totals[name] for name in names}
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

    def _finish(self, conversation: Conversation, example: Any) -> None:
        counts = self._sources[conversation.address.source]
        limit = self._section.max_length
        if len(example.token_ids) > limit:
            if self._section.overlong == "drop":
                self._reject(conversation.address, f"longer than data.max_length ({limit} tokens)")
                return
            counts["truncated"] += 1
            counts["truncated_tokens"] += len(example.token_ids) - limit
            example = truncated(example, limit)
            if example is None:
                counts["truncated"] -= 1
                self._reject(conversation.address, f"no target within data.max_length ({limit} tokens)")
                return
        self._writer.add(example)
        counts["kept"] += 1
        counts["tokens"] += len(example.token_ids)
        counts["supervised_tokens"] += int((example.loss_weights[1:] != 0).sum())
        if self._keep:
            self.kept_conversations.append(conversation)
            self._keep.write(json.dumps(_to_json(conversation), ensure_ascii=True) + "\n")

    def _reject(self, address: Address, reason: str) -> None:
        self._sources[address.source][f"dropped: {reason}"] += 1
        self._dropped[reason] += 1
        self._rejects.write(json.dumps({"address": str(address), "source": address.source, "reason": reason}) + "\n")


def _is_empty_turn(message: Message) -> bool:
    if message.role != "assistant" or message.weight == 0 or message.content.strip():
        return False
    return not any(message.extra.get(name) for name in ("tool_calls", "reasoning_content", "reasoning", "thinking"))


def _open(folder: Path, log: Callable[[str], None]) -> Dataset | None:
    """The dataset in a cache folder; None where there is none, or where it is damaged (which is logged)."""
    if not (folder / "dataset.json").is_file():
        return None
    try:
        stored = json.loads((folder / "dataset.json").read_text())
        with open(folder / "held_out.jsonl", encoding="utf-8") as lines:
            held = [_from_json(json.loads(line)) for line in lines]
        return Dataset(read_store(folder / "train"), read_store(folder / "held_out"), held, stored["report"],
                       stored["fingerprint"], folder)  # fmt: skip
    except (ValueError, KeyError, OSError) as error:
        log(f"data: the cache in {folder} is damaged and is built again: {error}")
        return None


def _to_json(conversation: Conversation) -> dict[str, Any]:
    messages = [dataclasses.asdict(message) for message in conversation.messages]
    return {"messages": messages, "address": dataclasses.asdict(conversation.address), "metadata": dict(conversation.metadata)}


def _from_json(stored: Mapping[str, Any]) -> Conversation:
    messages = tuple(Message(**message) for message in stored["messages"])
    return Conversation(messages, Address(**stored["address"]), stored["metadata"])


def _inputs(section: Any, sources: list[Source], eval_sources: list[Source], tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """All that decides the content of the examples, as the fingerprint covers it."""
    inputs = {name: getattr(section, name) for name in ("format", "max_length", "overlong", "train_on", "limit", "held_out_by",
                                                        "held_out_share", "novel_min")}  # fmt: skip
    inputs |= {"fields": dict(section.fields), "tokenizer": tokenizer.fingerprint,
               "train": {source.name: source.digest() for source in sources},
               "eval": {source.name: source.digest() for source in eval_sources}}  # fmt: skip
    if section.held_out_share:
        inputs["split_seed"] = seed
    return inputs


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _code_digest() -> str:
    """Hash of this package's code: what it wrote under another version is not read."""
    hasher = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that one process of this machine writes a cache folder at a time."""
    import fcntl

    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield
