"""A run directory, or two -> one HTML page that needs nothing else."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from itune.report.parts import comparisons, curves, data_section, evaluation, folded, opening, proofs
from itune.report.read import RunFiles, pair, read_evaluations, read_run, read_two
from itune.report.style import STYLE
from itune.report.tables import difference_table, differences, evaluation_table
from itune.writers import write_atomically

__all__ = ["read_evaluations", "report_numbers", "write_report"]



def write_report(
    workdir: str | os.PathLike, other: str | os.PathLike | None = None, out: str | os.PathLike | None = None
) -> Path:
    """Write the page of a run, or of two compared; return its path: `report.html` of the (first) run's folder.

    With `other` the page is `report-<other>.html` there. Raises InputError for a folder that is no run directory.
    """
    one, two = (read_run(workdir), None) if other is None else read_two(workdir, other)
    target = Path(out) if out else one.folder / (f"report-{two.name.replace('/', '-')}.html" if two else "report.html")
    title = one.name if two is None else f"{one.name} against {two.name}"
    sections = _single(one) if two is None else _double(one, two)
    body = [f"<h1>{html.escape(title)}</h1>", *opening(one, two), _contents(sections)]
    body += [f'<h2 id="{_anchor(name)}">{name}</h2>{text}' for name, text in sections if text]
    page = ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
            f'initial-scale=1"><title>{html.escape(title)}</title><style>{STYLE}</style>')  # fmt: skip
    write_atomically(target, f"{page}<body>{''.join(body)}</body></html>\n")
    return target


def report_numbers(workdir: str | os.PathLike, other: str | os.PathLike | None = None) -> dict[str, Any]:
    """What the page shows, as numbers: evaluations by step, paired comparisons, and the differences of the settings."""
    runs = [read_run(folder) for folder in (workdir, other) if folder is not None]
    found: dict[str, Any] = {
        "runs": [{"folder": str(run.folder), "last": run.records[-1] if run.records else {}, "paired": run.paired,
                  "evaluations": {str(step): run.evaluations[step] for step in run.steps}} for run in runs]
    }  # fmt: skip
    if len(runs) == 2:
        found["paired"] = _pairs(*runs)
        found["config_difference"] = differences(runs[0].json("config.json"), runs[1].json("config.json"))
    return found


def _single(run: RunFiles) -> list[tuple[str, str]]:
    return [
        ("Curves", curves(run)),
        ("Base against tuned", comparisons(run.paired, run, 0, run, ("base", f"step {run.last}"))),
        ("Evaluations", "".join(evaluation(run, name) for name in run.evaluators())),
        ("Data", data_section(run)),
        ("Proofs", proofs(run)),
        ("Settings", folded("config.json", run.json("config.json"))),
        ("Environment", folded("environment.json", run.json("environment.json"))),
    ]


def _double(one: RunFiles, two: RunFiles) -> list[tuple[str, str]]:
    names = (one.name, two.name)
    found = _pairs(one, two)
    tables = ""
    for name in dict.fromkeys(one.evaluators() + two.evaluators()):
        columns = [(f"{run.name}, step {run.last}", run.evaluations[run.last].get(name, {}))
                   for run in (one, two) if run.evaluations]  # fmt: skip
        tables += f"<h3>{html.escape(name)}</h3>{evaluation_table(columns)}"
    return [
        ("Curves", curves(one, two)),
        ("In pairs", comparisons(found, one, one.last, two, names)),
        ("Evaluations", tables),
        ("Settings that differ", difference_table(one.json("config.json"), two.json("config.json"), names)),
        ("Data that differs", difference_table(one.json("data/report.json"), two.json("data/report.json"), names)),
        ("Environment that differs",
         difference_table(one.json("environment.json"), two.json("environment.json"), names)),
        ("Proofs", proofs(one) + proofs(two)),
    ]  # fmt: skip


def _pairs(one: RunFiles, two: RunFiles) -> dict[str, Any]:
    names = [name for name in one.evaluators() if name in two.evaluators()]
    return {name: found for name in names if (found := pair(one, one.last, two, two.last, name))}


def _contents(sections: Sequence[tuple[str, str]]) -> str:
    return "<nav>" + "".join(f'<a href="#{_anchor(name)}">{name}</a>' for name, text in sections if text) + "</nav>"


def _anchor(name: str) -> str:
    return name.lower().replace(" ", "-")
