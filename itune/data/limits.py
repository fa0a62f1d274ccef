"""What the data must keep to before a run may start: `data.limits.*` and `data.novel_min`, judged from the report."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

from itune.types import InputError


class Judged(NamedTuple):
    """One limit: what the data have, what is asked for, and whether that is kept. `highest`: a bound from above."""

    key: str
    found: float
    limit: float
    highest: bool

    @property
    def kept(self) -> bool:
        return self.found <= self.limit if self.highest else self.found >= self.limit

    def __str__(self) -> str:
        return f"{self.key}: {self.found:.4g}, expected at {'most' if self.highest else 'least'} {self.limit:.4g}"


def judge(section: Any, report: Mapping[str, Any]) -> list[Judged]:
    """Every limit that the section sets, with what the report has."""
    rows = max(1, report["rows"] - report["held_out"]["report"]["rows"] + report["held_out"]["from_eval_sources"])
    found = report["quality"]["rows_found"]
    categories = report["categories"]["by_source"].values()
    shares = {
        "duplicates": found.get("duplicates", 0) / rows,
        "contradictions": found.get("contradiction", 0) / rows,
        "broken": found.get("broken", 0) / rows,
        "secrets": found.get("secret", 0) / rows,
        "personal": found.get("personal", 0) / rows,
        "contamination": report["held_out"]["training_rows_removed"] / rows,
        "dropped": sum(report["dropped"].values()) / rows,
        "lost_tokens": report["truncated_tokens"] / max(1, report["tokens"] + report["truncated_tokens"]),
        "unknown_category": sum(counts.get("unknown", 0) for counts in categories) / max(1, report["kept"]),
    }
    numbers = {
        "supervised": report["supervised_tokens"] / max(1, report["tokens"]),
        "examples": report["examples"],
        "effective_groups": report["voices"].get("coverage", {}).get("effective", 0.0),
    }
    limits = dataclasses.asdict(section.limits)
    judged = [Judged(f"data.limits.{name}", value, limits[name], True)
              for name, value in shares.items() if limits[name] < 1]  # fmt: skip
    judged += [Judged(f"data.limits.{name}", value, limits[name], False)
               for name, value in numbers.items() if limits[name] > 0]  # fmt: skip
    if section.novel_min:
        judged.append(Judged("data.novel_min", report["held_out"]["prompts"], section.novel_min, False))
    return judged


def require(section: Any, report: Mapping[str, Any]) -> None:
    """Raise InputError that names every limit which the data do not keep."""
    if report["held_out"]["prompts"] < section.novel_min:
        raise InputError(f"data.novel_min: {report['held_out']['prompts']} different held-out prompts remain; expected "
                         f"at least {section.novel_min}; raise data.held_out_share or add data.eval")
    broken = [str(each) for each in judge(section, report) if not each.kept]
    if broken:
        raise InputError(f"the data go beyond {len(broken)} of the limits: {'; '.join(broken)}. See the findings "
                         "(itune data report), or change data.limits")

