"""A run directory -> one HTML page that needs nothing else: the loss curve, evaluations, data and settings."""

from __future__ import annotations

import html
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itune.evaluators import flatten
from itune.types import InputError
from itune.writers import read_metrics, write_atomically

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; font-weight: normal; }
th { color: #666; } td.number { text-align: right; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: #666; }
.grid { stroke: #e4e4e4; } .train { stroke: #2166ac; fill: none; stroke-width: 1.5; }
.held { stroke: #b2182b; fill: #b2182b; stroke-width: 1.5; }
"""
Point = tuple[float, float]


def write_report(workdir: str | os.PathLike) -> Path:
    """Write `report.html` from the files of a run directory; return its path. Raises InputError for another folder."""
    folder = Path(workdir)
    records = read_metrics(folder / "metrics.jsonl")
    if not records and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: not a run directory: it has neither metrics.jsonl nor config.json")
    evaluations = read_evaluations(folder)
    train = [(record["step"], record["loss"]) for record in records if record.get("loss") is not None]
    held = [(step, metrics["heldout_loss/loss"]) for step, metrics in evaluations if "heldout_loss/loss" in metrics]
    parts = [
        f"<h1>{html.escape(folder.absolute().name)}</h1>",
        _facts(folder, records),
        "<h2>Loss</h2>" + (loss_curve(train, held) if train else "<p>No step was logged.</p>"),
        _evaluation_table(evaluations),
        _tree_table("Data", _read(folder / "data" / "report.json")),
        _tree_table("Settings", _read(folder / "config.json")),
        _tree_table("Environment", _read(folder / "environment.json")),
    ]
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(folder.absolute().name)}</title>'
    target = folder / "report.html"
    write_atomically(target, f"{page}<style>{_STYLE}</style><body>{''.join(parts)}</body></html>\n")
    return target


def read_evaluations(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, {evaluator/metric: number}) of every evaluation of a run, by step."""
    found = []
    for path in (folder / "eval").glob("*/summary.json"):
        if path.parent.name.isdecimal():
            found.append((int(path.parent.name), flatten(json.loads(path.read_text()))))
    return sorted(found, key=lambda item: item[0])


def loss_curve(train: Sequence[Point], held: Sequence[Point], width: int = 800, height: int = 300) -> str:
    """An SVG of the training loss (line) and the held-out loss (dots) over steps."""
    points = [*train, *held]
    low_x, high_x = min(x for x, _ in points), max(x for x, _ in points)
    low_y, high_y = min(y for _, y in points), max(y for _, y in points)
    left, right, top, bottom = 50, width - 10, 10, height - 25

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (right - left) * (x - low_x) / ((high_x - low_x) or 1),
                bottom - (bottom - top) * (y - low_y) / ((high_y - low_y) or 1))

    lines = []
    for tick in ticks(low_y, high_y):
        y = place(low_x, tick)[1]
        lines.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
                     f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>')
    for tick in ticks(low_x, high_x):
        x = place(tick, low_y)[0]
        lines.append(f'<text x="{x:.1f}" y="{height - 6}" text-anchor="middle">{tick:g}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in train))
    lines.append(f'<polyline class="train" points="{path}"/>')
    for point in held:
        x, y = place(*point)
        lines.append(f'<circle class="held" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>step {point[0]:g}: held-out loss '
                     f"{point[1]:.4f}</title></circle>")
    caption = "blue: training loss of a step" + ("; red: held-out loss" if held else "")
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(lines)}</svg><p>{caption}</p>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers between low and high."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [round(index * step, 12) for index in range(first, math.floor(high / step) + 1)]


def _facts(folder: Path, records: Sequence[Mapping[str, Any]]) -> str:
    crash = _read(folder / "crash.json")
    last = records[-1] if records else None
    text = f"Step {last['step']}, loss {last['loss']}." if last else ""
    if crash:
        text += f" The run failed: {crash.get('error', '')}"
    return f"<p>{html.escape(text)}</p>"


def _evaluation_table(evaluations: Sequence[tuple[int, Mapping[str, float]]]) -> str:
    if not evaluations:
        return ""
    names = sorted({name for _, metrics in evaluations for name in metrics})
    head = "".join(f"<th>step {step}</th>" for step, _ in evaluations)
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>" + "".join(_cell(metrics.get(name)) for _, metrics in evaluations) + "</tr>"
        for name in names
    )
    return f"<h2>Evaluations</h2><table><tr><th></th>{head}</tr>{rows}</table>"


def _cell(value: float | None) -> str:
    return f'<td class="number">{value:.4g}</td>' if value is not None else "<td></td>"


def _tree_table(title: str, tree: Mapping[str, Any]) -> str:
    if not tree:
        return ""
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(text)}</td></tr>" for name, text in _leaves(tree)
    )
    return f"<details><summary>{title}</summary><table>{rows}</table></details>"


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    leaves = []
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves += _leaves(value, f"{prefix}{name}.")
        else:
            leaves.append((f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)))
    return leaves


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
