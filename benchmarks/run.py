#!/usr/bin/env python3
"""itune against its peers: interleaved, in separate processes, on the same inputs; writes benchmarks/RESULTS.md.

    python -m benchmarks.run [ROW...] [--data FOLDER] [--repeats N] [--anyway]

Without rows all of them: 35 to 50 minutes on two cores. `--data`: folder with p3_sample.jsonl.gz and
gsm8k_messages.jsonl.gz. Numbers that must agree (losses, ids) are compared first; a row that fails is recorded as
failed and the others go on. Rerunning a row replaces its lines for this model of processor only. Refuses a busy
machine; `--anyway` measures all the same, says so in the table, and judges by CPU-seconds where a row has them. Exit
code 1 when a row failed or missed a bound.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine, table
from benchmarks.row import THREADS, Row, load, names
from itune.runtime import huge_pages

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names()))
    data, results = HERE.parent.parent / "shared" / "data", HERE / "results.json"
    parser.add_argument("--data", type=Path, default=data, help="folder with conversations: "
                        "p3_sample.jsonl.gz (prompt, completion), gsm8k_messages.jsonl.gz (messages), seed_tasks.jsonl")
    parser.add_argument("--repeats", type=int, default=0, help="rounds of each row; 0 is what the row says")
    parser.add_argument("--anyway", action="store_true", help="measure on a busy machine")
    parser.add_argument("--results", type=Path, default=results, help="JSON file; RESULTS.md is written beside it")
    given = parser.parse_args()
    unknown = [row for row in given.rows if row not in names()]
    if unknown:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(names())}")
    try:
        table.read(given.results)
    except ValueError as error:  # before minutes of measuring, not after
        parser.error(f"--results: {error}")
    load_now = machine.load()
    if load_now > machine.IDLE and not given.anyway:
        print(f"the machine is busy: load {load_now:.2f}, expected at most {machine.IDLE}; wait, or give --anyway")
        return 2
    missed = 0
    for name in given.rows or names():
        result = run_row(name, given)
        table.record(given.results, name, result)
        missed += result["failed"] is not None or any(not bound["holds"] for bound in result["bounds"])
        print(f"{name}: {table.summary(result)}", flush=True)
    return int(missed > 0)


def run_row(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Measure a row; whatever goes wrong is part of the result."""
    row, begun = load(name), time.time()
    result: dict[str, Any] = {
        "title": row.title, "note": row.note, "failed": None, "sides": {}, "bounds": [], "load": machine.load(),
        "date": time.strftime("%Y-%m-%d"), "repeats": 0,
        "command": " ".join(["python -m benchmarks.run", name, *(["--anyway"] if given.anyway else [])]),
        "machine": machine.describe(),
    }  # fmt: skip
    result["busy"] = result["load"] > machine.IDLE
    rounds: dict[str, list[dict[str, Any]]] = {side: [] for side in row.sides}
    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as temporary:
        folder = Path(temporary)
        environment = {
            **os.environ, **ENVIRONMENT, "ITUNE_BENCH_DATA": str(given.data.resolve()),
            "XDG_CACHE_HOME": str(folder / "cache"), "HF_DATASETS_CACHE": str(folder / "cache" / "hf"),
        }  # fmt: skip
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        try:
            side_of(name, "prepare", folder, environment, row.timeout)
            for turn in range(given.repeats or row.repeats):
                for side in row.sides:
                    rounds[side].append(side_of(name, side, folder, environment, row.timeout))
                if turn == 0:
                    check_equal(row, {side: found[0] for side, found in rounds.items()})
                result["repeats"] = turn + 1
            result["sides"] = {side: medians(found) for side, found in rounds.items()}
            result["bounds"] = judge(row, result)
        except Failure as error:
            result["failed"] = str(error)
        except KeyError as error:
            result["failed"] = f"no measure {error}"
        shutil.rmtree(folder / "cache", ignore_errors=True)
    result["seconds"] = round(time.time() - begun)
    return result


ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true", "OMP_NUM_THREADS": str(THREADS),
    "TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore",
}  # fmt: skip


class Failure(Exception):
    """Why a row has no result."""


def side_of(name: str, side: str, folder: Path, environment: dict[str, str], timeout: int) -> dict[str, Any]:
    """The measures that one side printed, run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.row", name, side, str(folder)]
    if side.startswith("itune"):
        environment = {**environment, **huge_pages.settings(environment)}  # as the command gives itself
    try:
        done = subprocess.run(
            command, env=environment, cwd=HERE.parent, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired as error:
        raise Failure(f"{side}: no result within {timeout} s") from error
    try:
        if done.returncode == 0:
            found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return found
    except (ValueError, IndexError):
        pass
    print(done.stdout[-3000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
    last = (done.stderr.strip() or done.stdout.strip() or "nothing printed").splitlines()[-1]
    raise Failure(f"{side}: exit code {done.returncode}: {last[:300]}")


def check_equal(row: Row, first: dict[str, dict[str, Any]]) -> None:
    """Raise Failure when what must agree between the sides differs by more than the row allows."""
    ours, *others = first
    for measure, most in row.equal:
        mine = first[ours][measure]
        for other in others:
            if measure not in first[other]:
                continue
            theirs = first[other][measure]
            pairs = list(zip(mine, theirs)) if isinstance(mine, list) else [(mine, theirs)]
            if isinstance(mine, list) and len(mine) != len(theirs):
                raise Failure(f"{measure}: {ours} has {len(mine)} of them, {other} {len(theirs)}")
            worst = max((abs(a - b) if not isinstance(a, str) else float(a != b) for a, b in pairs), default=0.0)
            if not worst <= most:
                raise Failure(f"{measure} of {ours} and {other} differ by {worst:.3g}; at most {most:g} is equal")


def medians(found: list[dict[str, Any]]) -> dict[str, Any]:
    """measure -> [median, lowest, highest] of the rounds; what is no number stays out."""
    numbers = [name for name, value in found[0].items() if isinstance(value, int | float)]
    values = {name: [each[name] for each in found] for name in numbers}
    return {name: [statistics.median(each), min(each), max(each)] for name, each in values.items()}


def judge(row: Row, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Each bound with the value that was found for it."""
    sides = list(row.sides)
    judged = []
    for bound in row.bounds:
        measure = bound.busy if result["busy"] and bound.busy else bound.measure
        ours = result["sides"][sides[0]][measure][0]
        peer = "" if bound.absolute else bound.peer or sides[1]
        value = ours if bound.absolute else ours / result["sides"][peer][measure][0]
        judged.append({"measure": measure, "peer": peer, "bound": bound.text, "value": value,
                       "holds": bound.holds(value)})  # fmt: skip
    return judged


if __name__ == "__main__":
    sys.exit(main())
