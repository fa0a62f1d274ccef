"""What the demo prints at its end: one table, five questions with both answers, and what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from itune.demo.world import shuffled

QUESTIONS = ("analytical", "analytical", "factual", "creative", "creative")  # the kinds of the five that are shown


def print_table(numbers: Mapping[str, Any]) -> None:
    """base | tuned | difference, each with its interval, by kind and over all."""
    from rich.table import Table

    table = Table(title=f"{numbers['novel']} novel instructions, answered by generation: share of right answers")
    for name in ("kind", "asked", "base", "tuned", "difference"):
        table.add_column(name, justify="left" if name == "kind" else "right")
    for kind, row in numbers["kinds"].items():
        table.add_row(kind, *_cells(row))
    table.add_section()
    table.add_row("all", *_cells(numbers))
    console().print(table)
    console().print("below each: its 95 % interval, bootstrap over tasks (an operation with a format, a fact, the last "
                    f"word of a line); {numbers['wins']} answers became right, {numbers['losses']} wrong")


def _cells(row: Mapping[str, Any]) -> list[str]:
    rates = [f"{row[name]:.1%}\n{row[f'{name}_low']:.1%} to {row[f'{name}_high']:.1%}" for name in ("base", "tuned")]
    return [str(row["items"]), *rates, f"{row['difference']:+.1%}\n{row['low']:+.1%} to {row['high']:+.1%}"]


def print_answers(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> None:
    """Five held-out questions of five tasks, chosen by a hash and not by how they were answered."""
    pairs = {tuned["prompt"]: (base, tuned) for base, tuned in zip(before, after, strict=True)}
    waiting = [pairs[prompt] for prompt in shuffled(pairs, "shown")]
    lines = []
    for kind in QUESTIONS:
        base, tuned = next(pair for pair in waiting if pair[1]["category"] == kind)
        waiting = [pair for pair in waiting if pair[1]["cluster"] != tuned["cluster"]]
        lines += ["", f"asked  {tuned['prompt']}", f"base   {_shown(base)}", f"tuned  {_shown(tuned)}"]
    console().print("\n".join(lines))


def _shown(item: Mapping[str, Any]) -> str:
    text = " ".join(item["answer"].split())
    return f"{text if len(text) <= 60 else text[:60] + ' ...'}  ({'right' if item['score'] else 'wrong'})"


def print_next(folder: Path, numbers: Mapping[str, Any]) -> None:
    """Where things are, and the next commands."""
    at, model = shlex.quote(str(folder)), shlex.quote(str(numbers["export"]))
    console().print(f"""
the tuned model, in Hugging Face format: {numbers['export']}
proof: loaded again, its logits differ from the trained model's by at most {numbers['max_abs_logit_difference']:.3g}
{numbers['seconds']:.0f} seconds in all; the numbers: {folder / 'demo.json'}, the report: {folder / 'report.html'}

next:
  itune chat --model {model} --max-new-tokens 24
      it knows the demo's words only; ask: Please reverse the order and use commas: river moon sun
  itune data show --config {at}/config.json
  itune train --config sft --config.model.path=MODEL --config.data.train=YOUR.jsonl --workdir runs/mine""")


def console() -> Any:
    """Plain lines without a terminal, never cut to a width that is not there."""
    import sys

    from rich.console import Console

    return Console(highlight=False, markup=False, soft_wrap=not sys.stdout.isatty())
