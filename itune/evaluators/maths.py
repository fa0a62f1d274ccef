"""The final answer of a worked solution: in a box, after `####` (GSM8K), after "the answer is", or the last number."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

_SAID = re.compile(
    r"\banswer(?:\s+(?:is|to [^.\n]{0,80}? is)\b\s*[:=]?|\s*[:=])\s*(?=(?P<answer>[^\n]+))", re.IGNORECASE
)
_AMOUNT = r"(?:(?:\d{1,3}(?:[, ]\d{3})+(?![\d/])|\d+)(?:\.\d+)?|\.\d+)"
_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])-)?(?:\d+ (?=\d+/\d))?{_AMOUNT}(?: ?/ ?\d+)?")
_MARK = re.compile(r"(?<!#)####(?!#)[ \t]*(?P<answer>[^\n]*)")
_AFTER_MARK = re.compile(r"[.,;%]*\s*$|\s+\(?[a-z]{2}")  # "18." and "18 eggs" are answers, "1. Add" is a heading
_VALUE = re.compile(
    rf"(?P<sign>[-+]?) *(?:(?P<whole>\d+) +(?=\d+ ?/))?(?P<top>-?{_AMOUNT})(?: ?/ ?(?P<below>{_AMOUNT}))?"
    r"(?:\s+(?!(?:pi|sqrt|times|over|plus|minus|mod|or|and|dozen|hundred|thousand|[mbtr]+illion)s?\b)"
    r"[^\W\d_]{2,}(?:\s+[^\W\d_]+)*(?:\s*\^\{?\d\}?)?)?"
)
_UNIT = re.compile(r"(?<=\S)\s*\\(?:text|mbox)\s*\{ [^{}]*\}(?:\^\{?\d\}?)?\s*$")  # units, in MATH
_WRAPPED = re.compile(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}")
_DRESS = re.compile(r"\\!|\\left|\\right|\\?[$%]|\^\{?\\circ\}?|\\[()\[\]]|°")
_SPACE = re.compile(r"\\[,;: ]|[~\u00a0\u2009\u202f]")
_FRACTION = re.compile(r"(?P<before>\d?)\s*\\frac\s*(?:\{(-?[\d.,]+)\}|(\d))\s*(?:\{([\d.,]+)\}|(\d))")


def score(item: Mapping[str, Any], answer: str) -> bool:
    """The final answers of the item's reference and of `answer` are the same number, or the same text."""
    return same(extract(item["reference"]), extract(answer))


def extract(text: str) -> str:
    """The final answer that a solution states, "" where it states none."""
    if (boxed := _last_box(text)) is not None:
        return boxed
    if (marked := _marked(text)) is not None:
        return marked
    said = list(_SAID.finditer(text))
    for match in reversed(said):
        number = _NUMBER.search(_in_line(match["answer"]))
        if number:
            return number[0]
    numbers = _NUMBER.findall(_in_line(text))
    return numbers[-1] if numbers else ""


def same(one: str, other: str) -> bool:
    r"""Equal as numbers (1,000 = 1000.0, 1/2 = 0.5, 50% = 50, 7 cm = 7), else as text.

    Text is compared as `is_equiv` of Hendrycks' MATH does; case, \text{} and braces around one character are dress too.
    """
    if not one.strip() or not other.strip():
        return False
    left, right = number_of(one), number_of(other)
    if left is not None and right is not None:
        return left == right
    return _text(one) == _text(other)


def number_of(text: str) -> Fraction | None:
    """The number that a short answer is, its unit and a name before `=` aside; None for anything else."""
    found = _VALUE.fullmatch(_in_line(_named(_UNIT.sub("", _plain(text)))).strip().rstrip("."))
    if not found:
        return None
    top, below = (Fraction(re.sub(r"[, ]", "", found[name] or "1")) for name in ("top", "below"))
    if not below:
        return None
    return (int(found["whole"] or 0) + top / below) * (-1 if found["sign"] == "-" else 1)


def _plain(text: str) -> str:
    """Text with one way to write minus, space, grouped digits and fractions, without what is only for the eye."""
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    return _SPACE.sub(" ", _DRESS.sub("", text))


def _in_line(text: str) -> str:
    """Plain text with fractions of numbers as a/b, one after a whole number apart from it."""
    unwrapped = _WRAPPED.sub(r" \1 ", _plain(text))
    return _FRACTION.sub(lambda m: f"{m['before']} {m[2] or m[3]}/{m[4] or m[5]}", unwrapped)


def _named(text: str) -> str:
    """What stands after `x =`."""
    name, equals, value = text.partition("=")
    return value if equals and "=" not in value and len(name) <= 2 else text


def _text(text: str) -> str:
    r"""The form in which texts are compared: \frac{1}{2} is \frac12, as TeX reads it."""
    unwrapped = _WRAPPED.sub(r"\1", _named(_UNIT.sub("", _plain(text))))
    bare = "".join(re.sub(r"(?<![\d.])\.(?=\d)", "0.", unwrapped).lower().split()).rstrip(".")
    return re.sub(r"(?<!\\)\{([^\\{}])\}", r"\1", bare)


def _marked(text: str) -> str | None:
    """What the last `####` with a number after it says, or one alone in the last line; None for mere headings."""
    marks = list(_MARK.finditer(text))
    for match in reversed(marks):
        line = _in_line(match["answer"]).strip().replace("*", "")
        number = _NUMBER.match(line)
        if number and _AFTER_MARK.match(line, number.end()):
            return number[0]
    if len(marks) == 1 and not text[marks[0].end() :].strip() and not _SAID.search(marks[0]["answer"]):
        return marks[0]["answer"].strip()
    return None


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
