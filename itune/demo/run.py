"""The demo: a base model learns to follow instructions, by the path that every user's run takes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itune.config import Config, load_config
from itune.demo import ASSETS, SEED, tasks
from itune.demo.show import print_answers, print_next, print_table
from itune.evaluators import paired
from itune.runtime.lock import RunLock
from itune.types import InputError, RunError

LISTS, VERSES, FACT_REPEATS = 9000, 1600, 3  # rows of the training file
NOVEL_MIN = 550  # fewer novel held-out prompts would be a fault
FILES = "demo"  # folder of the generated instructions
MARKER = Path(FILES) / "README.txt"  # by which an earlier demo is recognised
MARKED = "The instructions of `itune demo`. The next demo in the folder above replaces what this one left there.\n"
LEFT_BY_A_RUN = (
    FILES, "checkpoints", "config.json", "crash.json", "data", "demo.json", "environment.json", "eval", "export",
    "metrics.jsonl", "report.html", "summary.json", "tensorboard",
)  # fmt: skip

# in a generated world these filters find nothing and take seconds
IDLE_FILTERS = ("near_duplicate", "placeholder", "refusal", "truncated", "script", "language", "missing_input",
                "secret", "personal")  # fmt: skip

SETTINGS: dict[str, Any] = {
    **{f"data.quality.{name}": "off" for name in IDLE_FILTERS},
    "evaluators": ("heldout_loss", "generation"),
    "data.chat_template": "chatml",
    "data.held_out_by": "task",
    "data.novel_min": NOVEL_MIN,
    "data.overlap_grams": 1.0,  # a world of a few hundred words and templates: what is like an item is no leak of it,
    "data.overlap_cosine": 1.0,  # so equal prompts and prompts inside others are what may not be trained on
    "data.max_length": 64,
    "train.batch_size": 32,
    "train.max_steps": 400,
    "optimizer.learning_rate": 3e-3,
    "optimizer.schedule": "cosine",
    "optimizer.warmup": 20.0,
    "optimizer.weight_decay": 0.3,
    "optimizer.b2": 0.95,
    "checkpoint.every": 0,
    "eval.batch_size": 100,
    "eval.max_new_tokens": 24,
    "eval.score": "itune.demo.tasks:check",
    "eval.by": "kind",
    "log.every": 50,
}


def main(workdir: str | Path = "runs/demo", json_path: str | Path | None = None) -> dict[str, Any]:
    """Run the demo in `workdir`, print what came of it, and return the numbers that `demo.json` holds.

    base, tuned: share of held-out answers that are right. difference, low, high: their paired difference with its 95 %
    interval clustered by task. novel: held-out prompts, none of which is in the `rows_compared`
    training rows (data/heldout_proof.json). seconds: since the command began.
    export: folder of the tuned model. max_abs_logit_difference: of that folder, loaded again, from the trained model.
    A finished demo in `workdir` is replaced, an unfinished one goes on; anything else there is refused (InputError).
    Raises RunError when the run is stopped.
    """
    from itune.export import export_run
    from itune.loop import train
    from itune.runtime.allocator import keep_freed_memory
    from itune.runtime.environment import process_age

    keep_freed_memory()
    folder = Path(workdir)
    prepare_folder(folder)
    config = make_config(folder)
    print(f"itune demo: a small base model learns to follow instructions, in {folder}; a few minutes on a CPU, offline")
    result = train(config, folder)
    if result.preempted:
        raise RunError(f"the demo was stopped after step {result.step} of {result.total_steps}")
    exported = export_run(folder, folder / "export")
    before, after = (read_items(folder / "eval" / str(step) / "generation.jsonl") for step in (0, result.step))
    proof = json.loads((folder / "data" / "heldout_proof.json").read_text())
    numbers = compare(before, after) | {
        "novel": proof["novel_prompts"],
        "rows_compared": proof["train_rows"],
        "steps": result.step,
        "first_step": result.summary["seconds"]["first_step_of_process"],
        "seconds": process_age(),
        "export": exported["folder"],
        "max_abs_logit_difference": exported["max_abs_logit_difference"],
    }
    print_table(numbers)
    print_answers(before, after)
    print_next(folder, numbers)
    for path in (folder / "demo.json", *([Path(json_path)] if json_path else [])):
        path.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return numbers


def prepare_folder(folder: Path) -> None:
    """Write the instructions. An unfinished demo of this version goes on; what a finished one left goes, not more."""
    files = instructions(folder / FILES)
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            found = ", ".join(sorted(path.name for path in folder.iterdir())[:4])
            raise InputError(f"{folder}: is not empty and no earlier demo (it has {found}); choose another --workdir")
        if _can_go_on(folder, files):
            print(f"the demo in {folder} was not finished: it goes on from its last checkpoint")
            return
        with RunLock(folder):
            print(f"the earlier demo in {folder} is replaced")
            for path in [folder / name for name in LEFT_BY_A_RUN if (folder / name).exists()]:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    (folder / FILES).mkdir(parents=True)
    (folder / MARKER).write_text(MARKED, encoding="utf-8")
    for file, text in files.items():
        file.write_text(text, encoding="utf-8")


def instructions(folder: Path) -> dict[Path, str]:
    """The generated instructions: the texts of `train.jsonl` and `held_out.jsonl`, by their paths in a folder."""
    rows = {"train": tasks.train_rows(SEED, LISTS, VERSES, FACT_REPEATS), "held_out": tasks.held_out_rows(SEED)}
    return {folder / f"{name}.jsonl": "".join(json.dumps(row) + "\n" for row in rows[name]) for name in rows}


def _can_go_on(folder: Path, files: Mapping[Path, str]) -> bool:
    """Whether a run of just these instructions and settings was begun there, and not finished."""
    if (folder / "demo.json").exists() or not (folder / "config.json").is_file():
        return False
    same = all(file.is_file() and file.read_text(encoding="utf-8") == text for file, text in files.items())
    return same and json.loads((folder / "config.json").read_text()) == make_config(folder).to_dict()


def make_config(folder: Path) -> Config:
    """The config of the run: what `itune train --config runs/demo/config.json` would read."""
    return load_config("default", settings(folder / FILES))


def settings(files: Path) -> dict[str, Any]:
    """What differs from the defaults, by dotted key; `files` holds the instructions."""
    paths = {"data.train": str(files / "train.jsonl"), "data.eval": str(files / "held_out.jsonl")}
    return {**SETTINGS, "model.path": str(ASSETS / "base"), **paths}


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    """Base, tuned and their paired difference over the same items: overall, and by kind under `kinds`."""
    numbers = _compare_items(before, after)
    kinds = sorted({item["category"] for item in after})
    pairs = {kind: [(b, a) for b, a in zip(before, after, strict=True) if a["category"] == kind] for kind in kinds}
    return numbers | {"kinds": {kind: _compare_items(*map(list, zip(*pairs[kind]))) for kind in kinds}}


def _compare_items(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> dict[str, Any]:
    if [item["prompt"] for item in before] != [item["prompt"] for item in after]:
        raise ValueError("base and tuned were asked different questions")
    found = paired.compare(before, after)
    named = ("base", "base_low", "base_high", "tuned", "tuned_low", "tuned_high", "difference")
    return {
        "items": found["n"], "tasks": found["clusters"], **{name: found[name] for name in named},
        "low": found["difference_low"], "high": found["difference_high"], "wins": found["wins"],
        "losses": found["losses"], "detectable": found["detectable"],
    }  # fmt: skip


def read_items(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
