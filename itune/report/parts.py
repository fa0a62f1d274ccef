"""The sections of the page: curves, tiles, comparisons, evaluations, data, proofs."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any

from itune.evaluators import shown
from itune.report.answers import side_by_side
from itune.report.charts import Series, chart, is_finite, series
from itune.report.read import RunFiles
from itune.report.tables import evaluation_table, paired_table, parts, parts_table, tree_table

CURVES = (("loss", "Loss", "nats a token"), ("grad_norm", "Gradient norm", "before clipping"),
          ("learning_rate", "Learning rate", ""), ("tokens_per_second", "Speed", "tokens a second"))
PAIRED_WORDS = (
    "Below numbers stand 95 % intervals, by a bootstrap over tasks. A difference whose interval holds 0 shows nothing; "
    "the last column is the smallest true difference that this many items would have shown four times in five."
)


def curves(one: RunFiles, two: RunFiles | None = None) -> str:
    """Loss with the held-out loss, gradient norm, learning rate and speed, of one run or two."""
    runs = [(one, "one wide"), (two, "two")] if two else [(one, "one")]
    figures = []
    for key, title, unit in CURVES:
        lines: list[Series] = []
        for run, color in runs:
            name = run.name if two else ("training" if key == "loss" else "")
            lines.append(series(run.records, key, name, color))
            if key == "loss":
                label = f"{run.name}, held out" if two else "held out"
                lines.append(_judgements(run, "heldout_loss", "loss", label, f"{color if two else 'two'} dash"))
        figures.append(chart(title, lines, unit))
    for name in dict.fromkeys(name for run, _ in runs for name in run.evaluators()):
        lines = [_judgements(run, name, "score", run.name if two else "", color) for run, color in runs]
        if any(len(line.points) > 1 for line in lines):
            figures.append(chart(f"{name}: score", lines, "with 95 % intervals"))
    return f'<div class="charts">{"".join(figures)}</div>' if any(figures) else "<p>No step was logged.</p>"


def _judgements(run: RunFiles, evaluator: str, metric: str, name: str, kind: str) -> Series:
    """A number of an evaluator over the steps, with its intervals."""
    points: list[tuple[float, float]] = []
    ranges: dict[float, tuple[float, float]] = {}
    for step in run.steps:
        summary = run.evaluations[step].get(evaluator, {})
        if is_finite(summary.get(metric)):
            points.append((step, summary[metric]))
            if (bounds := shown.bounds(summary, metric)) and all(map(is_finite, bounds)):
                ranges[step] = bounds
    return Series(name, points, kind, True, ranges)


def opening(one: RunFiles, two: RunFiles | None) -> list[str]:
    return [_status(one), *([_status(two)] if two else []), *([] if two else [_tiles(one)])]


def _status(run: RunFiles) -> str:
    crash, summary = run.json("crash.json"), run.json("summary.json")
    last = run.records[-1] if run.records else {}
    of = f" of {summary['total_steps']}" if "total_steps" in summary else ""
    text = f"{run.name}: step {last.get('step', 0)}{of}"
    if summary.get("stopped_early"):
        text += f"; stopped early: {summary['stopped_early']}"
    if summary.get("preempted"):
        text += "; interrupted, the same command goes on"
    failed = f' <span class="bad">The run failed: {html.escape(str(crash.get("error", "")))}</span>' if crash else ""
    return f'<p class="dim">{html.escape(text)}.{failed}</p>'


def _tiles(run: RunFiles) -> str:
    tiles = []
    for name, found in run.paired.items():
        if "refused" in found:
            continue
        words = {True: ("better", "worse"), False: ("not shown", "not shown")}[found["sure"]]
        up = found["difference"] > 0 if "detectable" in found else found["difference"] < 0
        share = "detectable" in found
        numbers = [f"{100 * found[key]:.1f} %" if share else f"{found[key]:.3g}" for key in ("base", "tuned")]
        ends = [found[f"difference_{end}"] for end in ("low", "high")]
        known = [f"{100 * end:+.1f}" if share else f"{end:+.3g}" for end in ends if end is not None]
        interval = "of one task: no interval" if found["clusters"] == 1 else "without an interval"
        interval = " to ".join(known) + " points" * share if len(known) == 2 else interval
        kind = ("good" if up else "bad") if found["sure"] else "dim"
        verdict = f'<i class="{kind}">{words[0 if up else 1]}</i>'
        tiles.append(f'<div class="tile"><span>{html.escape(name)}, base to tuned</span>'
                     f"<b>{numbers[0]} → {numbers[1]}</b>"
                     f'<span>difference {interval} on {found["n"]} items, {verdict}</span></div>')
    seconds = run.json("summary.json").get("seconds", {})
    last = run.records[-1] if run.records else {}
    if isinstance(last.get("loss"), int | float):
        tiles.append(f'<div class="tile"><span>training loss, last step</span><b>{last["loss"]:.4g}</b></div>')
    if seconds:
        tiles.append(f'<div class="tile"><span>time</span><b>{_time(seconds.get("total", 0))}</b><span>'
                     + ", ".join(f"{key} {_time(seconds[key])}" for key in ("data", "weights", "compile", "evaluate")
                                 if key in seconds) + "</span></div>")  # fmt: skip
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _time(seconds: float) -> str:
    if seconds < 600:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def comparisons(found: Mapping[str, Any], one: RunFiles, step: int, two: RunFiles, names: tuple[str, str]) -> str:
    text = ""
    for name, comparison in found.items():
        if "refused" in comparison:
            why = html.escape(comparison["refused"])
            text += f'<h3>{html.escape(name)}</h3><p class="dim">Not compared: {why}.</p>'
            continue
        meaning = "score" + (f" by {comparison['score_by']}" if "score_by" in comparison else "")
        meaning = meaning if "detectable" in comparison else "nats a token, lower is better"
        text += f'<h3>{html.escape(name)} <span class="label">{html.escape(meaning)}</span></h3>'
        text += paired_table(comparison, names)
        if comparison.get("unmatched"):
            text += f'<p class="dim">{comparison["unmatched"]} items stand on one side only and are left out.</p>'
        text += side_by_side(one.items(step, name), two.items(two.last, name), names)
    return f'<p class="dim">{PAIRED_WORDS}</p>{text}' if text else ""


def evaluation(run: RunFiles, name: str) -> str:
    steps = [step for step in run.steps if name in run.evaluations[step]]
    chosen = steps if len(steps) <= 6 else [steps[0], *steps[-5:]]
    columns = [(f"step {step}", run.evaluations[step][name]) for step in chosen]
    note = ""
    if chosen != steps:
        note = f'<p class="dim">{len(steps) - 6} evaluations between the first two columns are left out.</p>'
    count = len(list(parts(columns[-1][1])))
    title = f"{columns[-1][0]} by category, source and group ({count})"
    more = f"<details><summary>{title}</summary>{parts_table(columns[-1][1])}</details>" if count else ""
    return f"<h3>{html.escape(name)}</h3>{evaluation_table(columns)}{note}{more}"


def data_section(run: RunFiles) -> str:
    link = "data/report.html"
    page = f'<p><a href="{link}">The data report</a> of this run.</p>' if (run.folder / link).is_file() else ""
    report = {key: value for key, value in run.json("data/report.json").items() if key != "held_out"}
    return page + (folded("data/report.json", report, opened=not page) if report else "")


def proofs(run: RunFiles) -> str:
    held = run.json("data/heldout_proof.json") or run.json("data/report.json").get("held_out") or {}
    exported = run.json("export/itune_proof.json")
    text = ""
    if held:
        short = {key: value for key, value in held.items() if key != "items"}
        text += folded(f"{run.name}: held out, what was compared and what was removed", short, opened=True)
    if exported:
        text += folded(f"{run.name}: export, loaded again and compared", exported, opened=True)
    return text


def folded(title: str, tree: Mapping[str, Any], opened: bool = False) -> str:
    if not tree:
        return ""
    return f"<details{' open' if opened else ''}><summary>{html.escape(title)}</summary>{tree_table(tree)}</details>"
