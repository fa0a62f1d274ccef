"""The checkpoints of a run for people: step, size, whether it verifies, and the numbers of its evaluation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from itune.checkpoint.manifest import find_damage, read_manifest, step_of
from itune.evaluators import read_summaries
from itune.types import InputError


def list_checkpoints(workdir: str | os.PathLike) -> list[dict[str, Any]]:
    """A row a checkpoint, oldest step first: step, bytes (None if unknown), damage (lines), metrics.

    Every byte is read to verify it. Raises InputError for a folder that holds no checkpoints, or a
    damaged summary of an evaluation.
    """
    folder = Path(workdir) / "checkpoints"
    found = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    steps = sorted(step for name in found if (step := step_of(name)) is not None)
    if not steps:
        raise InputError(f"{workdir}: no checkpoints; expected a run directory with checkpoints/STEP")
    rows = []
    for step in steps:
        damage = find_damage(folder / str(step), step)
        rows.append({"step": step, "bytes": None if damage else _size(folder / str(step)), "damage": damage,
                     "metrics": _metrics(Path(workdir) / "eval" / str(step) / "summary.json")})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as plain text; at most four numbers a row."""
    lines = [f"{'step':>10}  {'size':>10}  state     metrics"]
    for row in rows:
        size = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:,.1f} MB"
        numbers = ", ".join(f"{name} {value:.4g}" for name, value in list(row["metrics"].items())[:4])
        state = "damaged" if row["damage"] else "verified"
        lines.append(f"{row['step']:>10}  {size:>10}  {state:<8}  {numbers or '-'}")
        lines += [f"{'':>24}{line}" for line in row["damage"]]
    return "\n".join(lines)


def _size(folder: Path) -> int:
    return sum(file["size"] for file in read_manifest(folder)["files"].values())


def _metrics(path: Path) -> dict[str, float]:
    """evaluator/metric -> number, of an evaluation's summary; {} where there is none."""
    return {f"{name}/{metric}": value for name, summary in read_summaries(path).items()
            for metric, value in summary.items() if isinstance(value, int | float)}
