#!/usr/bin/env python3
"""Average precision of `itune data score` on the demo's world, 16 % of whose training rows are defects.

    python benchmarks/data_scores.py --out FOLDER [--seeds 301,302,303] [--steps 200] [--rows 6000]

The demo's base model is tuned on the defective rows for about two passes, then it scores the rows that it was tuned on.
Prints one JSON line a seed and model: tuned, and the base model that was never tuned, whose scores are chance.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from itune.config import Config, load_config
from itune.demo import ASSETS, SEED, tasks
from itune.demo.run import SETTINGS
from itune.demo.world import NOUNS
from itune.evaluators.data_scores import Evaluator, average_precision

DEFECTS = ("another answer of its kind", "words shuffled", "one word changed", "cut off", "any other answer", "echo")
SHARE = 0.16


def spoiled(row: dict, kind: str, rows: list[dict], rng: np.random.Generator) -> str:
    """The row's answer with a defect; the same answer where that defect is impossible."""
    question, answer = (message["content"] for message in row["messages"])
    words = answer.split()
    if kind == "another answer of its kind":
        rows = [other for other in (rows[i] for i in rng.integers(len(rows), size=200)) if other["kind"] == row["kind"]]
        return rows[0]["messages"][1]["content"]
    if kind == "words shuffled":
        return " ".join(words[i] for i in rng.permutation(len(words)))
    if kind == "one word changed":
        words[int(rng.integers(len(words)))] = str(rng.choice(NOUNS))
        return " ".join(words)
    if kind == "cut off":
        return " ".join(words[: max(1, int(len(words) * rng.uniform(0.3, 0.8)))])
    if kind == "any other answer":
        return rows[int(rng.integers(len(rows)))]["messages"][1]["content"]
    return question


def planted(seed: int, count: int) -> tuple[list[dict], dict[int, str]]:
    """(`count` rows of the demo, the defect of each defective row by its number from 0)."""
    rng = np.random.default_rng(seed)
    rows = tasks.train_rows(SEED, 9000, 1600, 3)
    rows = [rows[i] for i in rng.permutation(len(rows))[:count]]
    truth = {}
    for place, index in enumerate(rng.permutation(count)[: round(SHARE * count)].tolist()):
        kind = DEFECTS[place % len(DEFECTS)]
        answer = spoiled(rows[index], kind, rows, rng)
        if answer != rows[index]["messages"][1]["content"]:
            question = rows[index]["messages"][0]
            rows[index] = {**rows[index], "messages": [question, {"role": "assistant", "content": answer}]}
            truth[index] = kind
    return rows, truth


def config_of(folder: Path, rows: list[dict], steps: int) -> Config:
    folder.mkdir(parents=True, exist_ok=True)
    files = {"train": rows, "held_out": tasks.held_out_rows(SEED)[:100]}
    for name, content in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return load_config("default", {
        **SETTINGS, "model.path": str(ASSETS / "base"), "data.train": str(folder / "train.jsonl"),
        "data.eval": str(folder / "held_out.jsonl"), "data.novel_min": 0, "evaluators": (), "train.max_steps": steps,
    })  # fmt: skip


def judge(items: list[dict[str, Any]], truth: dict[int, str]) -> dict[str, Any]:
    """Average precision of the ranking and of its two signs, and of the ranking for each kind of defect alone."""
    kinds = np.asarray([truth.get(int(item["address"].rsplit(":", 1)[1]) - 1, "") for item in items])
    value = {name: np.asarray([item[name] for item in items]) for name in ("suspicion", "ratio", "min_p", "loss")}
    defect = kinds != ""
    alone = {}
    for kind in DEFECTS:
        chosen = (kinds == kind) | ~defect
        alone[kind] = average_precision(value["suspicion"][chosen], defect[chosen])
    return {
        "rows": len(items), "share": round(float(defect.mean()), 4),
        "average_precision": round(average_precision(value["suspicion"], defect), 4),
        "ratio": round(average_precision(value["ratio"], defect), 4),
        "min_p": round(average_precision(-value["min_p"], defect), 4),
        "loss": round(average_precision(value["loss"], defect), 4),
        "by_kind": {kind: round(found, 3) for kind, found in alone.items()},
    }  # fmt: skip


def measure(folder: Path, seed: int, steps: int, count: int) -> dict[str, dict[str, Any]]:
    """{"tuned": numbers, "base": numbers} of one seed."""
    from itune.data.dataset import prepare
    from itune.loop import train
    from itune.models import load_pretrained
    from itune.saved_run import load_run
    from itune.setup_run import model_settings

    rows, truth = planted(seed, count)
    config = config_of(folder, rows, steps)
    train(config, folder / "run")
    run = load_run(folder / "run")
    dataset = prepare(config.data, run.tokenizer)
    base = load_pretrained(config.model.path, run.model.mesh, **model_settings(config, run.tokenizer))
    found = {}
    for name, (model, params) in {"tuned": (run.model, run.params), "base": base}.items():
        _, items = Evaluator(config).run(model, params, run.tokenizer, dataset)
        found[name] = judge(items, truth)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="301,302,303")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rows", type=int, default=6000)
    given = parser.parse_args()
    for seed in map(int, given.seeds.split(",")):
        for name, numbers in measure(given.out / str(seed), seed, given.steps, given.rows).items():
            print(json.dumps({"row": f"data score, {name}", "seed": seed, "steps": given.steps, **numbers}), flush=True)


if __name__ == "__main__":
    main()
