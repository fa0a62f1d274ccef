"""The final answer of a worked solution: after `####` (GSM8K), in a box, after "the answer is", or the last number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_SAID = re.compile(
    r"\banswer(?:\s+(?:is|to [^.\n]{0,80}? is)\b\s*[:=]?|\s*[:=])\s*(?=(?P<answer>[^\n]+))", re.IGNORECASE
)
_NUMBER = re.compile(r"-?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:\s*/\s*\d+)?")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(-?[^{}]+)\}\s*\{([^{}]+)\}")
_DRESS = re.compile(r"\\(?:text|mathrm|mbox)\s*\{[^{}]*\}|\\[,;! ]|\\left|\\right|\\?[$%]|[{}]|\^\\?circ")


def score(item: Mapping[str, Any], answer: str) -> bool:
    """The final answers of the item's reference and of `answer` are the same number, or the same text."""
    return same(extract(item["reference"]), extract(answer))


def extract(text: str) -> str:
    """The final answer that a solution states, "" where it states none."""
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0].strip()
    if (boxed := _last_box(text)) is not None:
        return boxed
    said = list(_SAID.finditer(text))
    for match in reversed(said):
        number = _NUMBER.search(_plain(match["answer"]))
        if number:
            return number[0]
    numbers = _NUMBER.findall(_plain(text))
    return numbers[-1] if numbers else ""


def same(one: str, other: str) -> bool:
    """Equal as numbers (1,000 = 1000.0, 1/2 = 0.5, 50% = 50), else as text without case and white space."""
    if not one.strip() or not other.strip():
        return False
    left, right = number_of(one), number_of(other)
    if left is not None and right is not None:
        return left == right
    return _text(one) == _text(other)


def number_of(text: str) -> Fraction | None:
    """The number that a short answer is, its unit aside; None for anything else."""
    plain = _plain(text).strip().rstrip(".")
    found = _NUMBER.findall(plain)
    if len(found) != 1 or re.search(r"[=^√π]|\\", plain) or re.search(r"[^\W\d_]", plain.split(found[0])[0]):
        return None
    try:
        return Fraction(re.sub(r"[,\s]", "", found[0]))
    except (ValueError, ZeroDivisionError):
        return None


def _plain(text: str) -> str:
    """Text without the dress of LaTeX, fractions as a/b."""
    return _DRESS.sub("", _FRACTION.sub(r"\1/\2", text))


def _text(text: str) -> str:
    return "".join(_plain(text).lower().split()).rstrip(".")


def _last_box(text: str) -> str | None:
    r"""What the last \boxed{...} or \fbox{...} holds, braces balanced; None where there is none that closes."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)\s*\{", text)]
    for start in reversed(starts):
        depth = 1
        for at in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            if depth == 0:
                return text[start:at].strip()
    return None
