"""Sources -> a folder of rendered examples and a report: what `dataset.prepare` does when its cache has no answer."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import gc
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from itune.data import findings as found_in
from itune.data.categories import CATEGORIES
from itune.data.census import Census, describe
from itune.data.findings import Finding, finding
from itune.data.overlong import Part, fit
from itune.data.render import render_many
from itune.data.selection import clear, select
from itune.data.sources import Source
from itune.data.store import ExampleStore, Writer, conversation_to_json, hash_of, read_store
from itune.data.templates import Tokenizer, require_template
from itune.types import Conversation, InputError, Message

CHUNK = 256  # conversations that are encoded as one batch


def build(folder: Path, section: Any, sources: list[Source], eval_sources: list[Source], tokenizer: Tokenizer,
          seed: int, inputs: Mapping[str, Any], log: Callable[[str], None]) -> None:  # fmt: skip
    """Write a cache folder under another name, then give it its own: it is whole or absent.

    `inputs` is what the fingerprint covers. Raises InputError for bad input with its address.
    """
    require_template(tokenizer)
    started = time.monotonic()
    temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.writing-", dir=folder.parent))
    try:
        with _collecting_only_new():
            report = _build(temporary, section, sources, eval_sources, tokenizer, seed, inputs)
        if folder.exists():
            shutil.rmtree(folder)
        os.rename(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    told = f"{_left_out(report)}{_apart(report['held_out'])}"
    log(f"data: {report['rows']:,} rows -> {report['examples']:,} examples, {report['tokens']:,} tokens "
        f"({report['supervised_tokens']:,} supervised){told}; {time.monotonic() - started:.1f} s")


def _apart(held_out: Mapping[str, Any]) -> str:
    held, given, share = held_out["report"], held_out["from_eval_sources"], held_out["share"]
    if not held["rows"]:
        return ""
    both = f" ({given:,} of data.eval + {held['rows'] - given:,} of data.train, data.held_out_share={share:g})"
    return (f"; held out: {held['rows']:,} rows{both if given and share else ''} -> {held['examples']:,} items"
            f"{_left_out(held)}")


def _left_out(report: Mapping[str, Any]) -> str:
    drops = ", ".join(f"{count:,} {reason}" for reason, count in report["dropped"].items()) or "none"
    return f", left out: {drops}"


@contextlib.contextmanager
def _collecting_only_new() -> Iterator[None]:
    """Garbage is collected (a start of `itune train` has that off), but not sought among all that was there before."""
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()


def _build(folder: Path, section: Any, sources: list[Source], eval_sources: list[Source], tokenizer: Tokenizer,
           seed: int, inputs: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    chosen = select(section, sources, eval_sources, seed)
    rows, gone = chosen.rows, set(chosen.quality.dropped)
    census, held_census = Census(), Census()
    census.add_rows(rows)
    census.add_held_out(chosen.split["from_training_sources"])
    categories = [CATEGORIES.index(category.name) for category in chosen.categories]
    rendered = _Rendering(folder / "rendered", section, tokenizer, census, section.overlong, categories)
    rendered.add(rows, [index for index in range(len(rows)) if index not in gone])
    held_census.add_rows(chosen.held)
    policy = "truncate" if section.overlong == "split" else section.overlong  # an item to judge by is never split
    held = _Rendering(folder / "rendered_held_out", section, tokenizer, held_census, policy, keep=True)
    held.add(chosen.held, range(len(chosen.held)))

    known = sorted(set(rendered.row_of_example))
    cleared = clear(section, [rows[index] for index in known], [part.conversation for part in held.kept])
    kept = {known[index] for index in cleared.train}
    removed = [dataclasses.replace(found, index=known[found.index])
               for found in cleared.findings if found.filter != "held_out"]  # fmt: skip
    removed_items = [dataclasses.replace(found, index=held.row_of_example[found.index])
                     for found in cleared.findings if found.filter == "held_out"]  # fmt: skip
    train = rendered.finish(folder / "train", [row in kept for row in rendered.row_of_example])
    left = set(cleared.held)
    items = held.finish(folder / "held_out", [place in left for place in range(len(held.kept))])
    with open(folder / "held_out.jsonl", "w", encoding="utf-8") as lines:
        for place in sorted(left):
            lines.write(json.dumps(conversation_to_json(held.kept[place].conversation)) + "\n")

    dropped = gone | {found.index for found in (*rendered.findings, *removed)}
    later = [*rendered.findings, *removed]
    census.add_drops(rows, dropped, [*chosen.quality.deciding, *later])
    census.add_examples(train)
    lost = [*held.findings, *removed_items]
    held_census.add_drops(chosen.held, {found.index for found in lost}, lost)
    held_census.add_examples(items)
    found_in.write_findings(folder / "findings.jsonl", [*chosen.quality.findings, *later], dropped)
    found_in.write_rejects(folder / "rejects.jsonl", rows, dropped, [*chosen.quality.deciding, *later])
    found_in.write_rejects(folder / "rejects.jsonl", chosen.held, {f.index for f in lost}, lost, append=True)
    (folder / "heldout_proof.json").write_text(json.dumps(chosen.split | cleared.proof, indent=1) + "\n")

    summary = {name: value for name, value in cleared.proof.items() if name not in ("items", "novel_min", "removed")}
    held_out = chosen.split | summary | {
        "items": len(items), "prompts": cleared.proof["novel_prompts"], "report": held_census.report(),
        "training_rows_compared": len(known), "training_rows_removed": len(removed),
        "removed": [found.address for found in removed[:1000]], "removed_by": cleared.proof["removed"]["reasons"],
    }  # fmt: skip
    report = census.report() | describe(section, chosen, train, dropped) | {
        "held_out": held_out, "benchmarks": cleared.benchmarks, "inputs": dict(inputs),
    }  # fmt: skip
    digests = {"train": train.fingerprint, "held_out": items.fingerprint}
    fingerprint = hash_of({**inputs, **digests})
    (folder / "dataset.json").write_text(json.dumps({"report": report, "fingerprint": fingerprint}))
    return report


class _Rendering:
    """Renders rows chunk by chunk into a store on disk; `row_of_example` tells the row of each example.

    `categories` has the category of each row. With `keep`, the conversations of the examples stay in memory, in `kept`.
    """

    def __init__(self, folder: Path, section: Any, tokenizer: Tokenizer, census: Census, policy: str,
                 categories: Sequence[int] = (), keep: bool = False):  # fmt: skip
        self._folder, self._section, self._tokenizer, self._policy = folder, section, tokenizer, policy
        self._census, self._writer, self._categories, self._keep = census, Writer(folder), categories, keep
        self.row_of_example: list[int] = []
        self.kept: list[Part] = []
        self.findings: list[Finding] = []

    def add(self, rows: Sequence[Conversation], chosen: Sequence[int]) -> None:
        """Render the chosen rows; those that cannot be trained on become findings. Raises InputError at a bad row."""
        factors = _factors(self._section.source_weights, rows)
        waiting: list[int] = []
        for index in chosen:
            if any(_is_empty_turn(message) for message in rows[index].messages):
                self.findings.append(finding("empty_turn", "empty assistant turn", index, rows[index]))
            else:
                waiting.append(index)
        for first in range(0, len(waiting), CHUNK):
            part = waiting[first : first + CHUNK]
            outcomes = render_many([rows[index] for index in part], self._tokenizer, self._section.train_on)
            for index, outcome in zip(part, outcomes):
                if outcome.error is not None:
                    raise outcome.error
                assert outcome.example is not None
                self._census.notes.update(outcome.notes)
                self._fit(index, Part(rows[index], outcome.example), factors)
        self._writer.close()

    def finish(self, folder: Path, keep: Sequence[bool]) -> ExampleStore:
        """The store of the examples to keep; the one rendered first goes."""
        if all(keep):
            os.rename(self._folder, folder)
            return read_store(folder)
        writer, store = Writer(folder), read_store(self._folder)
        for place in np.flatnonzero(np.asarray(keep, bool)).tolist():
            writer.add(store[place], int(store.categories[place]))
        writer.close()
        shutil.rmtree(self._folder)
        return read_store(folder)

    def _fit(self, index: int, whole: Part, factors: Mapping[str, float]) -> None:
        section, source = self._section, whole.conversation.address.source
        fitted = fit(*whole, self._tokenizer, section.max_length, self._policy, section.train_on)
        if not fitted.parts:
            self.findings.append(finding("overlong", fitted.reason, index, whole.conversation))
            return
        if fitted.parts[0] is not whole and len(whole.example.token_ids) > section.max_length:
            self._census.add_cut(source, len(fitted.parts), fitted.lost_tokens, fitted.lost_targets)
        for part in fitted.parts:
            example = part.example
            if factors.get(source, 1.0) != 1.0:
                weights = example.loss_weights * np.float32(factors[source])
                example = dataclasses.replace(example, loss_weights=weights)
            self._writer.add(example, self._categories[index] if self._categories else -1)
            self.row_of_example.append(index)
            if self._keep:
                self.kept.append(part)


def _factors(weights: Mapping[str, Any], rows: Sequence[Conversation]) -> dict[str, float]:
    """`data.source_weights`, checked. Raises InputError for an unknown source and for what is no positive number."""
    names = dict.fromkeys(row.address.source for row in rows)
    for name, value in weights.items():
        if name not in names and rows:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.4)
            hint = f" (nearest: {near[0]})" if near else ""
            raise InputError(f"data.source_weights: no source is called {name}{hint}; sources: {', '.join(names)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise InputError(f"data.source_weights.{name}: found {value!r}; expected a number above 0 (to leave a "
                             "source out, take it from data.train)")
    return {name: float(value) for name, value in weights.items()}


def _is_empty_turn(message: Message) -> bool:
    if message.role != "assistant" or message.weight == 0 or message.content.strip():
        return False
    return not any(message.extra.get(name) for name in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
