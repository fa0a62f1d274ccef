"""A config's data section -> rendered examples on disk, and a report of what became of every row."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from itune.data.limits import judge, require
from itune.data.sources import Source, open_sources
from itune.data.store import ExampleStore, conversation_from_json, hash_of, read_store
from itune.data.tokenizer import Tokenizer
from itune.storage.cache import cache_folder as user_cache
from itune.storage.cache import code_digest, locked
from itune.types import Conversation, RunError
from itune.writers import plain, write_atomically

FINGERPRINTED = (
    "format", "fields", "max_length", "overlong", "train_on", "limit", "source_field", "category_field", "categories",
    "group_field", "rating_field", "held_out_by", "held_out_share", "overlap_grams", "overlap_cosine",
    "overlap_removes", "near_duplicate", "predicate", "source_weights",
)  # fmt: skip

RECORDS = ("findings.jsonl", "rejects.jsonl", "heldout_proof.json")  # what a run keeps beside its report


@dataclasses.dataclass
class Dataset:
    """What training and evaluation read. `held_out[i]` is the rendering of `held_out_conversations[i]`.

    report: rows in and out by source, drops with reasons, tokens, the held-out proof. fingerprint: hash of the inputs
    and of the rendered content. folder: the cache folder that holds all of it.
    """

    train: ExampleStore
    held_out: ExampleStore
    held_out_conversations: list[Conversation]
    report: dict[str, Any]
    fingerprint: str
    folder: Path

    def rejects(self) -> Iterator[dict[str, Any]]:
        """Each row that was left out: address, source, reason, reasons, messages, metadata."""
        with open(self.folder / "rejects.jsonl", encoding="utf-8") as lines:
            yield from map(json.loads, lines)

    def write_record(self, folder: Path, section: Any) -> None:
        """Write what is kept of the data: report.html and .json, findings.jsonl, rejects.jsonl, heldout_proof.json."""
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "report.json", json.dumps(self.report, indent=1, default=plain) + "\n")
        for name in RECORDS:
            shutil.copyfile(self.folder / name, part := folder / f".{name}.part")
            os.replace(part, folder / name)
        from itune.data.page import page

        proof = json.loads((folder / "heldout_proof.json").read_text())
        write_atomically(folder / "report.html", page(self.report, judge(section, self.report), proof))


def prepare(section: Any, tokenizer: Any, seed: int = 0, log: Callable[[str], None] = print,
            check: bool = True) -> Dataset:  # fmt: skip
    """Read, split, filter and render what a DataSection names, or open what an earlier call left in the cache.

    Processes on one machine share the work: one renders, the others wait and read its files. Raises InputError for bad
    input with its address, and RunError where the cache folder cannot be written. With `check`, InputError too where
    fewer held-out prompts than `novel_min` remain, or the data go beyond one of `limits`.
    """
    if not isinstance(tokenizer, Tokenizer):
        from itune.data.render import as_tokenizer

        tokenizer = as_tokenizer(tokenizer)
    sources = open_sources(section.train, "data.train")
    eval_sources = open_sources(section.eval, "data.eval") if section.eval else []
    inputs = fingerprint_inputs(section, sources, eval_sources, tokenizer, seed)
    places = [source.places for source in (*sources, *eval_sources)]  # the records name rows by file and line
    made_of = {**inputs, "code": code_digest(Path(__file__).parent), "places": places}
    folder = cache_folder(section.cache_dir) / hash_of(made_of)[:32]
    try:
        with locked(folder.with_suffix(".lock")):
            dataset = _open(folder, log)
            if dataset is not None:
                log(f"data: {len(dataset.train):,} examples from the cache in {folder}")
            else:
                from itune.data.build import build  # with all rules for quality, a fifth of a second

                build(folder, section, sources, eval_sources, tokenizer, seed, inputs, log)
                dataset = _open(folder, log)
    except OSError as error:
        raise RunError(f"data.cache_dir: {folder.parent} cannot be used: {error}; "
                       "expected a writable folder with space") from error
    if dataset is None:
        raise RunError(f"data.cache_dir: {folder} does not hold what was just written to it; expected a sound disk")
    for line in dataset.report.get("warnings", ()):
        log(line)
    if check:
        require(section, dataset.report)
    return dataset


def cache_folder(cache_dir: str = "") -> Path:
    """Where tokenised data is kept: `cache_dir`, or `itune/data` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir).expanduser()
    return user_cache() / "data"


def fingerprint_inputs(section: Any, sources: list[Source], eval_sources: list[Source], tokenizer: Tokenizer,
                       seed: int) -> dict[str, Any]:  # fmt: skip
    """All that decides the content of the examples, by name: what a resumed run is compared with."""
    inputs: dict[str, Any] = {name: getattr(section, name) for name in FINGERPRINTED}
    inputs["quality"] = dataclasses.asdict(section.quality)
    inputs["predicate_code"] = ""
    if section.predicate:
        from itune.data.quality import predicate_digest

        inputs["predicate_code"] = predicate_digest(section.predicate)
    inputs["tokenizer"] = tokenizer.fingerprint
    inputs["train"] = {source.name: source.digest() for source in sources}
    inputs["eval"] = {source.name: source.digest() for source in eval_sources}
    benchmarks = open_sources(section.benchmarks, "data.benchmarks") if section.benchmarks else []
    inputs["benchmarks"] = {source.name: source.digest() for source in benchmarks}
    if section.held_out_share:
        inputs["split_seed"] = seed
    return inputs


def _open(folder: Path, log: Callable[[str], None]) -> Dataset | None:
    """The dataset in a cache folder; None where there is none, or where it is damaged (which is logged)."""
    if not (folder / "dataset.json").is_file():
        return None
    try:
        stored = json.loads((folder / "dataset.json").read_text())
        with open(folder / "held_out.jsonl", encoding="utf-8") as lines:
            held = [conversation_from_json(json.loads(line)) for line in lines]
        train, held_out = read_store(folder / "train"), read_store(folder / "held_out")
        if len(held) != len(held_out):
            raise ValueError(f"{len(held)} held-out conversations; expected {len(held_out)}")
        return Dataset(train, held_out, held, stored["report"], stored["fingerprint"], folder)
    except (ValueError, KeyError, TypeError, OSError) as error:
        log(f"data: the cache in {folder} is damaged and is built again: {error}")
        return None
