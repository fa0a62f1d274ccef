#!/usr/bin/env python3
"""Precision, recall, speed and memory of the data filters, on real rows with planted defects.

    python benchmarks/data_quality.py --data ../shared/data [--part accuracy|scale|all] [--seeds 201,202,203]

`--data` is a folder with p3_sample.jsonl.gz, gsm8k_messages.jsonl.gz and seed_tasks.jsonl. Prints one JSON line a row.
Rates come with Wilson intervals over all seeds together. What a filter finds in real rows counts as wrong, even where
it is right, so that precision is a lower bound.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from itune.data import (
    broken,
    contamination,
    contradictions,
    dedup,
    heldout,
    planting,
    privacy,
    quality,
    rewording,
    words,
)
from itune.data.formats import convert, detect_format
from itune.data.sources import open_sources
from itune.evaluators.stats import wilson
from itune.types import Address, Conversation, Message

LEAKS = ("leak_verbatim", "leak_cased", "leak_wrapped", "leak_paraphrased")


def load(folder: Path) -> dict[str, list[Conversation]]:
    """The real rows by file, those without an answer left out."""
    found: dict[str, list[Conversation]] = {}
    for name in ("p3_sample", "gsm8k_messages"):
        rows = list(open_sources(str(folder / f"{name}.jsonl.gz"))[0].rows())
        found[name] = [convert(row, detect_format(rows[:8])) for row in rows]
    found["seed_tasks"] = []
    for number, line in enumerate((folder / "seed_tasks.jsonl").read_text().splitlines(), start=1):
        task = json.loads(line)
        for each in task["instances"]:
            prompt = f"{task['instruction']}\n{each['input']}".strip()
            messages = (Message("user", prompt), Message("assistant", each["output"]))
            address = Address("seed_tasks", "seed_tasks.jsonl", number)
            found["seed_tasks"].append(Conversation(messages, address, {"task": task["name"]}))
    return {name: [row for row in rows if row.messages[-1].content.strip()] for name, rows in found.items()}


def pool(real: dict[str, list[Conversation]], seed: int) -> list[Conversation]:
    """2,100 rows of P3, 720 of GSM8K and the 175 seed tasks."""
    rng = np.random.default_rng(seed)
    parts = (("p3_sample", 2100), ("gsm8k_messages", 720))
    chosen = [real[name][i] for name, count in parts for i in rng.permutation(len(real[name]))[:count]]
    return chosen + real["seed_tasks"]


def rate(successes: int, n: int) -> dict[str, object]:
    low, high = wilson(successes, n)
    return {"rate": round(successes / n, 4) if n else None, "low": round(low, 4), "high": round(high, 4), "n": n}


def contradicted(real: dict[str, list[Conversation]], seeds: list[int]) -> Iterator[dict]:
    totals, precisions, recalls = np.zeros(3, int), [], []
    for seed in seeds:
        kinds = ["contradiction", "benign_duplicate", "sibling"]
        rows, truth = planting.plant_pairs(pool(real, seed), kinds, 0.05, seed)
        right, wrong = planting.judge_pairs(contradictions.find_contradictions(rows), truth, "contradiction")
        totals += [len(right), len(wrong), len(truth["contradiction"])]
        precisions.append(len(right) / (len(right) + len(wrong)))
        recalls.append(len(right) / len(truth["contradiction"]))
    yield {
        "row": "contradictions", "seeds": seeds, "mean_precision": round(float(np.mean(precisions)), 4),
        "mean_recall": round(float(np.mean(recalls)), 4), "precision": rate(int(totals[0]), int(totals[0] + totals[1])),
        "recall": rate(int(totals[0]), int(totals[2])),
    }  # fmt: skip


def broken_pairs(real: dict[str, list[Conversation]], seeds: list[int]) -> Iterator[dict]:
    for kind in (*broken.KINDS, "secret", "personal"):
        right, found_all, planted_all = 0, 0, 0
        for seed in seeds:
            planted = planting.plant(pool(real, seed), kind, 0.04, seed)
            find = privacy.find_private if kind in ("secret", "personal") else broken.find_broken
            found = {each.index for each in find(planted.conversations, [kind])}
            right += len(found & set(planted.truth))
            found_all, planted_all = found_all + len(found), planted_all + len(planted.truth)
        yield {"row": kind, "seeds": seeds, "precision": rate(right, found_all), "recall": rate(right, planted_all)}


def duplicates(real: dict[str, list[Conversation]], seeds: list[int]) -> Iterator[dict]:
    for kind in ("exact_duplicate", "near_duplicate"):
        right, planted = 0, 0
        for seed in seeds:
            rows, truth = planting.plant_pairs(real["gsm8k_messages"], [kind], 0.05, seed)
            found = {each.index: each.other for each in dedup.find_duplicates(rows)}
            right += sum(found.get(row) == origin for row, origin in truth[kind].items())
            planted += len(truth[kind])
        yield {"row": kind, "seeds": seeds, "recall": rate(right, planted)}
    clean = dedup.find_duplicates(real["gsm8k_messages"])
    yield {"row": "duplicates in 4,000 rows of GSM8K as they are", "found": len(clean)}


def leaks(real: dict[str, list[Conversation]], seeds: list[int]) -> Iterator[dict]:
    short = [row for row in real["p3_sample"] if len(words.prompt_text(row).split()) < 60] + real["seed_tasks"]
    everything = [row for rows in real.values() for row in rows]
    for name, rows, held_out in (("short prompts", short, 400), ("all prompts", everything, 500)):
        hits, planted, flagged, clean_rows = dict.fromkeys(LEAKS, 0), 0, 0, 0
        for seed in seeds:
            order = np.random.default_rng(seed).permutation(len(rows))
            held, clean = [rows[i] for i in order[:held_out]], [rows[i] for i in order[held_out:]]
            made = {kind: planting.plant(held, kind, 0.2, seed).conversations[len(held) :] for kind in LEAKS}
            training = clean + [row for kind in LEAKS for row in made[kind]]
            texts = [[words.prompt_text(row) for row in part] for part in (held, training)]
            matched = contamination.Comparison(*texts).overlap().match >= 0
            parts = np.split(matched[len(clean) :], len(LEAKS))
            hits = {kind: hits[kind] + int(part.sum()) for kind, part in zip(LEAKS, parts)}
            planted, flagged = planted + len(parts[0]), flagged + int(matched[: len(clean)].sum())
            clean_rows += len(clean)
        yield {
            "row": f"held out, {name}", "seeds": seeds, "recall": rate(sum(hits.values()), len(LEAKS) * planted),
            **{kind: rate(count, planted) for kind, count in hits.items()},
            "clean_rows_flagged": rate(flagged, clean_rows),
        }  # fmt: skip


def natural(real: dict[str, list[Conversation]]) -> Iterator[dict]:
    rows = [row for part in real.values() for row in part]
    report = quality.check(rows)
    yield {"row": "found in real rows as they are", "rows": len(rows), **report.to_dict(examples=0)["found"]}


def many(real: dict[str, list[Conversation]], count: int) -> list[Conversation]:
    """The real rows, then shuffled, reworded and misspelt ones of them until there are `count`."""
    rng = np.random.default_rng(0)
    base = [row for part in real.values() for row in part]
    rows = list(base)
    while len(rows) < count:
        row = base[int(rng.integers(len(base)))]
        parts = row.messages[0].content.split(" ")
        way = int(rng.integers(4))
        if way == 0:
            rng.shuffle(parts)
        elif way == 1:
            parts = [part[::-1] if rng.random() < 0.3 else part for part in parts]
        text = rewording.wrapped(" ".join(parts), rng) if way == 2 else " ".join(parts)
        messages = (Message("user", text), row.messages[-1])
        rows.append(Conversation(messages, Address("many", "many.jsonl", len(rows)), row.metadata))
    return rows


def timed(name: str, rows: int, run) -> dict:
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    return {
        "row": name, "rows": rows, "found": found, "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
    }  # fmt: skip


def scale(real: dict[str, list[Conversation]]) -> Iterator[dict]:
    rows = many(real, 100_000)
    characters = sum(len(message.content) for row in rows for message in row.messages)
    yield {"row": "100,000 rows", "characters": characters}
    yield timed("duplicates, exact and near", len(rows), lambda: len(dedup.find_duplicates(rows)))
    yield timed("contradictions", len(rows), lambda: len(contradictions.find_contradictions(rows)))
    yield timed("broken pairs, all kinds", len(rows), lambda: len(broken.find_broken(rows)))
    yield timed("secrets and personal data", len(rows), lambda: len(privacy.find_private(rows)))
    everything = [row for part in real.values() for row in part]
    order = np.random.default_rng(0).permutation(len(everything))
    held, train = [everything[i] for i in order[:1000]], [everything[i] for i in order[1000:11_000]]
    texts = [[words.prompt_text(row) for row in part] for part in (held, train)]
    overlap = timed("held out, 1,000 against 10,000, one pass", len(train),
                    lambda: int((contamination.Comparison(*texts).overlap().match >= 0).sum()))  # fmt: skip
    yield overlap
    yield timed("held out, 1,000 against 10,000, to the proof", len(train),
                lambda: len(heldout.decontaminate(train, held).findings))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", choices=("accuracy", "scale", "all"), default="all")
    parser.add_argument("--seeds", default="201,202,203", help="seeds that no threshold was chosen on")
    given = parser.parse_args()
    real, seeds = load(given.data), [int(seed) for seed in given.seeds.split(",")]
    accuracy = (contradicted, broken_pairs, duplicates, leaks)
    if given.part != "scale":
        for part in accuracy:
            for row in part(real, seeds):
                print(json.dumps(row), flush=True)
        for row in natural(real):
            print(json.dumps(row), flush=True)
    if given.part != "accuracy":
        for row in scale(real):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
