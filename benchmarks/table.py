"""results.json (row -> its results, one a processor, unrounded) -> RESULTS.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.row import names
from itune.writers import write_atomically

HEAD = """# Results

Written by `python -m benchmarks.run`; unrounded numbers stand in `results.json`. A row is a comparison in separate
processes, in turn, on the same inputs; numbers are medians of the rounds with the lowest and the highest. "Found" is
itune's number over the peer's, or its own where no peer is named. Rows that were lost stay in the table. Ratios depend
on the processor (the matrix products of torch are MKL's, faster on Intel's than on AMD's; those of itune are XLA's), so
a row stands once for each that it was measured on: a run replaces the lines of its own processor only. From 2026-11-28
on itune's side has huge pages, as its command gives itself; the peer starts as it does by itself (RESULTS_SINGLE.md
has it with them), but for `generation`, where both run in one process.
`RESULTS_GPU.md` holds what was measured on a GPU, `RESULTS_SINGLE.md` benchmarks with a command of their own.
"""


def read(path: Path) -> dict[str, list[dict[str, Any]]]:
    """What results.json holds, nothing where there is none yet. ValueError for a file that is something else."""
    if path.suffix != ".json":
        raise ValueError(f"{path}: expected a name that ends in .json (RESULTS.md is written beside it)")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no folder {path.parent}")
    try:
        results: Any = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(results, dict):
        raise ValueError(f"{path}: found a JSON {type(results).__name__}, expected an object of rows")
    return results


def record(path: Path, name: str, result: dict[str, Any]) -> None:
    """Replace the row of this processor in results.json, whole or not at all, and write RESULTS.md beside it anew."""
    results = read(path)
    others = [each for each in results.get(name, []) if processor(each) != processor(result)]
    results[name] = sorted([*others, result], key=processor)
    results = {key: results[key] for key in names() if key in results}
    write_atomically(path, json.dumps(results, indent=1) + "\n")
    write_atomically(path.with_name("RESULTS.md"), page(results))


def processor(result: dict[str, Any]) -> str:
    """The model alone: "2 cores, AMD EPYC, 25 GB" -> "AMD EPYC"."""
    model: str = result["machine"]["cpu"].split(", ", 1)[1].rsplit(", ", 1)[0]
    return model.replace("(R)", "").removesuffix(" Processor")


def page(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = [HEAD, "| row | measure | peer | processor | found | bound | holds |", "|---" * 7 + "|"]
    each = [(name, result) for name, found in results.items() for result in found]
    for name, result in each:
        at = processor(result)
        if result["failed"]:
            lines.append(f"| {name} | | | {at} | failed: {cell(result['failed'])} | | no |")
        for bound in result["bounds"]:
            held = "yes" if bound["holds"] else "**no**"
            lines.append(f"| {name} | {bound['measure']} | {bound['peer'] or '-'} | {at} | {bound['value']:.3g} | "
                         f"{bound['bound']} | {held}{' (busy machine)' if result['busy'] else ''} |")
    for name, result in each:
        lines += ["", f"## {name}, {processor(result)}", ""]
        lines += [result["title"] + (f" {result['note']}" if result["note"] else ""), ""]
        if result["failed"]:
            lines += [f"Failed: {result['failed']}", ""]
        lines += details(result)
        at = result["machine"]
        versions = ", ".join(f"{key} {value}" for key, value in at.items() if key != "cpu")
        busy = f", BUSY (load {result['load']:.1f})" if result["busy"] else ""
        lines += ["", f"{result['date']}, {result['repeats']} rounds, {result['seconds']} s{busy}: "
                  f"`{result['command']}`; {at['cpu']}; {versions}"]
    return "\n".join(lines) + "\n"


def details(result: dict[str, Any]) -> list[str]:
    """A table with a line a measure and a column a side."""
    sides = result["sides"]
    measures = dict.fromkeys(name for side in sides.values() for name in side)
    if not measures:
        return []
    lines = ["| measure | " + " | ".join(sides) + " |", "|---" * (len(sides) + 1) + "|"]
    for measure in measures:
        cells = [spread(side[measure]) if measure in side else "" for side in sides.values()]
        lines.append(f"| {measure} | " + " | ".join(cells) + " |")
    return lines


def spread(values: list[float]) -> str:
    """Median (lowest to highest)."""
    middle, low, high = (number(value) for value in values)
    return middle if low == high else f"{middle} ({low} to {high})"


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def summary(result: dict[str, Any]) -> str:
    """One line for the terminal."""
    if result["failed"]:
        return f"failed: {result['failed']}"
    judged = [f"{bound['measure']}{' vs ' + bound['peer'] if bound['peer'] else ''} {bound['value']:.3g} "
              f"({bound['bound']}: {'holds' if bound['holds'] else 'MISSED'})" for bound in result["bounds"]]
    return f"{'; '.join(judged) or 'recorded'} [{result['seconds']} s{', busy' if result['busy'] else ''}]"
