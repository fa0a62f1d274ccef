"""All quality filters behind one call: what each found, and, by the action chosen for it, which rows go.

Actions by filter: `off`, `keep` (count, list, and keep the rows), `drop`, and for contradictions `majority` (the most
frequent answer stays). Nothing is dropped by default, save by the user's own predicate. The report names every finding
with its address; `findings.write_rejects` keeps what was dropped.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from itune.data import broken, contradictions, dedup, privacy
from itune.data.findings import Finding, finding, tally
from itune.types import Conversation, InputError

Predicate = Callable[[Conversation], bool | str]

FILTERS = (
    "exact_duplicate", "near_duplicate", "contradiction", *broken.KINDS, "secret", "personal", "predicate",
)
ACTIONS = ("off", "keep", "drop", "majority")
DEFAULTS = {name: "drop" if name == "predicate" else "keep" for name in FILTERS}


@dataclasses.dataclass(frozen=True)
class QualityReport:
    """What the filters found in `rows` rows, and the rows to drop (indices, ascending)."""

    rows: int
    actions: Mapping[str, str]
    findings: tuple[Finding, ...]
    dropped: tuple[int, ...]

    @property
    def kept(self) -> list[int]:
        """Indices of the rows that stay, in order."""
        gone = set(self.dropped)
        return [index for index in range(self.rows) if index not in gone]

    @property
    def deciding(self) -> list[Finding]:
        """The findings for which rows go."""
        return [found for found in self.findings if self.actions[found.filter] in ("drop", "majority")]

    def to_dict(self, examples: int = 20) -> dict[str, Any]:
        """JSON object: counts by filter and reason, and up to `examples` findings of each filter with addresses."""
        listed: dict[str, list[dict]] = {}
        for found in self.findings:
            if len(listed.setdefault(found.filter, [])) < examples:
                listed[found.filter].append(found.to_dict())
        rows: dict[str, set[int]] = {name: {f.index for f in self.findings if f.filter == name} for name in listed}
        rows["broken"] = set().union(*(rows.get(kind, ()) for kind in broken.KINDS))
        rows["duplicates"] = rows.get("exact_duplicate", set()) | rows.get("near_duplicate", set())
        return {
            "rows_found": {name: len(found) for name, found in rows.items()},
            "rows_in": self.rows, "rows_kept": self.rows - len(self.dropped), "rows_dropped": len(self.dropped),
            "actions": dict(self.actions), "found": tally(self.findings), "examples": listed,
        }


def check(
    conversations: Sequence[Conversation],
    actions: Mapping[str, str] | None = None,
    *,
    predicate: str = "",
    near_duplicate: float = 0.7,
) -> QualityReport:
    """Run the filters. `actions` changes the defaults, by filter; `predicate` is `package.module:function`.

    Every filter sees all rows, so that the majority of a contradicted question is counted before duplicates go. Raises
    InputError for an unknown filter or action, and for a predicate that cannot be used.
    """
    chosen = resolve(actions or {})
    on = {name for name, action in chosen.items() if action != "off"}
    found: list[Finding] = []
    if on & {"exact_duplicate", "near_duplicate"}:
        repeats = dedup.find_duplicates(conversations, near_duplicate, near="near_duplicate" in on)
        found += [each for each in repeats if each.filter in on]
    if "contradiction" in on:
        found += contradictions.find_contradictions(conversations)
    if on & set(broken.KINDS):
        found += broken.find_broken(conversations, on & set(broken.KINDS))
    if on & {"secret", "personal"}:
        found += privacy.find_private(conversations, sorted(on & {"secret", "personal"}))
    if predicate and "predicate" in on:
        found += apply_predicate(conversations, find_predicate(predicate))
    return QualityReport(len(conversations), chosen, tuple(found), tuple(_dropped(conversations, chosen, found)))


def resolve(actions: Mapping[str, str]) -> dict[str, str]:
    """The action of every filter; raises InputError with the nearest name for what is unknown."""
    for name, action in actions.items():
        if name not in FILTERS:
            near = difflib.get_close_matches(name, FILTERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"filters: {', '.join(FILTERS)}"
            raise InputError(f"data.quality: no filter is called {name!r}; {hint}")
        allowed = ACTIONS if name == "contradiction" else ACTIONS[:3]
        if action not in allowed:
            raise InputError(f"data.quality.{name}: found {action!r}; expected one of {', '.join(allowed)}")
    return DEFAULTS | dict(actions)


def _dropped(rows: Sequence[Conversation], actions: Mapping[str, str], found: Sequence[Finding]) -> list[int]:
    gone: set[int] = set()
    for each in found:
        if actions[each.filter] == "drop":
            gone.add(each.index)
            if each.filter == "contradiction":
                gone.add(each.other)
    if actions["contradiction"] == "majority":
        gone |= set(contradictions.minority([each for each in found if each.filter == "contradiction"], rows))
    return sorted(gone)


def find_predicate(name: str) -> Predicate:
    """The user's `package.module:function`: takes a Conversation, returns True to keep it, or False or a reason.

    It comes from the config, never from a data file. Raises InputError naming what is missing.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not module_name or not function_name:
        raise InputError(f"data.predicate: found {name!r}; expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"data.predicate: cannot import {module_name!r} of {name!r}: {error}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(f"data.predicate: {module_name} has no function {function_name!r}; it has {', '.join(public)}")
    return function


def predicate_digest(name: str) -> str:
    """Hash of the file that a predicate stands in, so that data filtered by other code are made anew."""
    try:
        path = inspect.getsourcefile(find_predicate(name))
    except TypeError as error:  # built into Python, or an object that can be called
        raise InputError(f"data.predicate: {name!r} has no source file; expected a Python function") from error
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if path else ""


def apply_predicate(conversations: Sequence[Conversation], predicate: Predicate) -> list[Finding]:
    """A finding for each row that the predicate does not keep. Raises InputError at the row where it fails."""
    found = []
    for index, row in enumerate(conversations):
        try:
            verdict = predicate(row)
        except Exception as error:  # the user's code: whatever it raises is an answer about this row
            raise InputError(f"{row.address}: data.predicate raised {type(error).__name__}: {error}") from error
        if not isinstance(verdict, bool | str):
            raise InputError(f"{row.address}: data.predicate gave {verdict!r}; expected True, False or a reason")
        if verdict is not True:
            found.append(finding("predicate", verdict or "not kept by the predicate", index, row))
    return found
