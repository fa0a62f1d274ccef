"""What `itune data report` and `itune data split` do: a page about the data; files to train on and to judge by."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from itune.config import Config
from itune.data import heldout
from itune.data.census import Census
from itune.data.dataset import prepare
from itune.data.findings import write_findings, write_rejects
from itune.data.limits import judge
from itune.data.loader import Loader
from itune.data.mixture import Mixture
from itune.data.selection import clear, select
from itune.data.sources import Source, open_sources
from itune.data.templates import load_tokenizer
from itune.types import Conversation, InputError, RunError
from itune.writers import write_atomically

Log = Callable[[str], None]


def report(config: Config, out: str = "data-report", log: Log = print) -> dict[str, Any]:
    """Prepare the data as training would and write `out`/report.html, report.json, findings, rejects and proof.

    Returns the report. Raises InputError for bad input; RunError, after everything is written, where the data go
    beyond data.limits or data.novel_min.
    """
    if not config.model.path:
        raise InputError("config: model.path is empty; expected a folder or hub id with a tokenizer")
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template, config.model.revision or None)
    dataset = prepare(config.data, tokenizer, seed=config.seed, log=log, check=False)
    folder = Path(out)
    if len(dataset.train):
        loader = Loader(
            dataset.train, batch_size=config.train.batch_size, max_length=config.data.max_length,
            packing=config.data.packing, seed=config.seed, epochs=config.train.epochs,
            max_steps=config.train.max_steps, mixture=Mixture.of(config.data),
        )  # fmt: skip
        dataset.report["mixture"] = loader.realised()
    dataset.write_record(folder, config.data)
    for line in _told(dataset.report):
        log(line)
    log(f"report: {folder / 'report.html'}")
    broken = [str(each) for each in judge(config.data, dataset.report) if not each.kept]
    if broken:
        raise RunError(f"the data go beyond {len(broken)} of the limits: {'; '.join(broken)} (see {folder})")
    return dataset.report


def _told(report: dict[str, Any]) -> list[str]:
    found = {name: count for name, count in report["quality"]["rows_found"].items()
             if count and name not in ("broken", "duplicates")}  # fmt: skip
    held = report["held_out"]
    listed = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in found.items())
    lines = [f"found: {listed or 'nothing'}"]
    if held["items"]:
        lines.append(f"held out: {held['items']:,} items, {held['prompts']:,} different prompts; "
                     f"{held['training_rows_removed']:,} training rows removed; closest pair left "
                     f"{held['highest_score']:.2f}")  # fmt: skip
    return lines


def split(config: Config, out: str = "data-split", log: Log = print) -> dict[str, Any]:
    """Write `out`/train.jsonl, eval.jsonl, rejects.jsonl, findings.jsonl and heldout_proof.json; return the counts.

    The split, the filters and the removal of matches are those of training; no tokenizer is needed. Each row keeps its
    fields, and where it came from as `source` and `address`. Raises InputError when fewer than data.novel_min different
    held-out prompts remain, or where a train.jsonl or eval.jsonl of `out` is data or somebody else's; writes nothing
    then.
    """
    section = config.data
    if not section.train:
        raise InputError("config: data.train is empty; set it to a file, a folder or a dataset id")
    if not section.held_out_share and not section.eval:
        raise InputError("data split: nothing says what to hold out; set data.held_out_share=0.1 (and data.held_out_by "
                         "to a field such as task), or data.eval to files of held-out items")
    sources = open_sources(section.train, "data.train")
    eval_sources = open_sources(section.eval, "data.eval") if section.eval else []
    _check_parts(Path(out), [*sources, *eval_sources])
    chosen = select(section, sources, eval_sources, config.seed)
    rows = [chosen.rows[index] for index in chosen.quality.kept]
    cleared = clear(section, rows, chosen.held)
    proof = chosen.split | cleared.proof
    if proof["novel_prompts"] < section.novel_min:
        raise InputError(f"data.novel_min: {proof['novel_prompts']} different held-out prompts remain; expected at "
                         f"least {section.novel_min}; raise data.held_out_share or add data.eval")
    train, held = [rows[i] for i in cleared.train], [chosen.held[i] for i in cleared.held]
    gone = set(chosen.quality.dropped)
    matched = [found for found in cleared.findings if found.filter != "held_out"]
    census = Census()
    census.add_rows(chosen.rows)
    census.add_held_out(chosen.split["from_training_sources"])
    census.add_drops(chosen.rows, gone, chosen.quality.deciding)
    census.add_drops(rows, {found.index for found in matched}, matched)
    folder = Path(out)
    for path, part in zip(_parts(folder), (train, held), strict=True):
        _write_rows(path, part)
    write_atomically(folder / "heldout_proof.json", json.dumps(proof, indent=1) + "\n")
    write_findings(folder / "findings.jsonl", chosen.quality.findings, gone)
    write_rejects(folder / "rejects.jsonl", chosen.rows, gone, chosen.quality.deciding)
    write_rejects(folder / "rejects.jsonl", rows, {found.index for found in matched}, matched, append=True)
    lost = [found for found in cleared.findings if found.filter == "held_out"]
    write_rejects(folder / "rejects.jsonl", chosen.held, {found.index for found in lost}, lost, append=True)
    log(f"train: {len(train):,} rows, eval: {len(held):,} items, in {folder}; left out: "
        + (", ".join(f"{count:,} {reason}" for reason, count in census.dropped.items()) or "nothing"))
    log(heldout.summary(proof))
    return {"folder": str(folder), "train": len(train), "eval": len(held), "dropped": dict(census.dropped),
            "sources": {name: dict(counts) for name, counts in census.sources.items()},
            "proof": {name: value for name, value in proof.items() if name != "items"}}  # fmt: skip


def _parts(folder: Path) -> tuple[Path, Path]:
    return folder / "train.jsonl", folder / "eval.jsonl"


def _check_parts(folder: Path, sources: Sequence[Source]) -> None:
    """Raise InputError where a file that the split would replace is one of the sources, or none of an earlier split."""
    for path in _parts(folder):
        if path.exists() and any(path.samefile(file) for source in sources for file in source.files):
            raise InputError(f"{path}: is read as data; choose another folder for --out")
        if path.exists() and not (folder / "heldout_proof.json").is_file():
            raise InputError(f"{path}: is there, and no part of an earlier split; choose another folder for --out")


def _write_rows(path: Path, rows: Sequence[Conversation]) -> None:
    lines = []
    for row in rows:
        messages = []
        for message in row.messages:
            weight = {} if message.weight is None else {"weight": message.weight}
            messages.append({"role": message.role, "content": message.content, **weight, **message.extra})
        origin = {"source": row.address.source, "address": str(row.address)}
        lines.append(json.dumps({"messages": messages, **origin, **row.metadata}) + "\n")
    write_atomically(path, "".join(lines))
