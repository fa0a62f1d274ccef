"""The run that another one starts from (`train.init_from`), and a run's config wherever it is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from itune.checkpoint import Store
from itune.checkpoint.view import open_view
from itune.config import Config, load_config
from itune.data import words
from itune.setup_run import Data, Log, prepare_data
from itune.storage.bucket import is_url
from itune.types import InputError


def run_config(folder: Path) -> Config:
    """A run's config. Relative paths that lead nowhere from here are taken from the folder it was started in."""
    config = load_config(folder / "config.json")
    try:
        began = Path(json.loads((folder / "environment.json").read_text(encoding="utf-8"))["folder"])
    except (OSError, ValueError, KeyError, TypeError):  # a run of an earlier release, or a part of one
        return config

    def found(path: str) -> str:
        lost = bool(path) and not is_url(path) and not Path(path).exists() and (began / path).exists()
        return str(began / path) if lost else path

    parts = {section: getattr(config, section) for section in ("model", "train", "data")}
    for section, key in (("model", "path"), ("train", "init_from"), ("data", "chat_template")):
        parts[section] = dataclasses.replace(parts[section], **{key: found(getattr(parts[section], key))})
    return dataclasses.replace(config, **parts)


def open_start(config: Config, log: Log) -> tuple[Path, Store]:
    """Folder and checkpoints of `train.init_from`. Raises InputError where it is no run directory."""
    start = config.train.init_from
    folder = open_view(start).folder if is_url(start) else Path(start)
    if not (folder / "checkpoints").is_dir():
        model = (folder / "config.json").is_file()
        raise InputError(f"train.init_from: {start} has no checkpoint; it must be a run directory"
                         f"{' (a model folder goes into model.path)' if model else ''}")
    return folder, Store(folder / "checkpoints", log=log)


def prepared(config: Config, log: Log, begin: Callable[..., Any], fresh: bool) -> Data:
    """`prepare_data`. Of a `fresh` run `train.init_from` is looked for before, and its training data are compared."""
    folder = open_start(config, log)[0] if fresh and config.train.init_from else None
    data = prepare_data(config, log, begin)
    if folder and (count := trained_on(folder, data.dataset)):
        log(f"warning: {count} of the {len(data.dataset.held_out):,} held-out items are of sources that "
            f"{config.train.init_from} trained on, and it did not hold them out; take its data.held_out_* and seed")
    return data


def trained_on(run: Path, dataset: Any) -> int:
    """Held-out items that a run may have been trained on: of its sources, neither held out there nor left out."""
    try:
        sources = json.loads((run / "data" / "report.json").read_text(encoding="utf-8"))["sources"]
        proof = json.loads((run / "data" / "heldout_proof.json").read_text(encoding="utf-8"))
        with open(run / "data" / "rejects.jsonl", encoding="utf-8") as lines:
            gone = {_place(json.loads(line)["address"]) for line in lines}
        held = {item["sha256"] for item in proof["items"]}
    except (OSError, ValueError, LookupError, TypeError):  # no record of the data: nothing can be said
        return 0
    rows = [row for row in dataset.held_out_conversations if row.address.source in sources]
    return sum(words.prompt_digest(row) not in held and _place(str(row.address)) not in gone for row in rows)


def _place(address: str) -> str:
    return address.rpartition("/")[2]
