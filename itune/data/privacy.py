"""Secrets and personal data by pattern: what has a shape and, where one exists, a valid checksum.

Names, addresses and free-text descriptions of people have no shape and are not found. Reports and rejects never repeat
what was found; they name the kind and mask the rest.
"""

from __future__ import annotations

import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from itune.data.findings import Finding, finding
from itune.types import Conversation


class Match(NamedTuple):
    """Where a pattern stands in a text: group ("secret" or "personal"), kind, span."""

    group: str
    kind: str
    start: int
    end: int


def _always(found: re.Match) -> bool:
    return True


def _luhn(found: re.Match) -> bool:
    """The check digit of payment cards (ISO/IEC 7812)."""
    digits = [int(letter) for letter in found.group() if letter.isdigit()]
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return 13 <= len(digits) <= 19 and sum(doubled) % 10 == 0 and len(set(digits)) > 1


def _iban(found: re.Match) -> bool:
    """The check digits of an account number (ISO 13616)."""
    text = re.sub(r"\s", "", found.group()).upper()
    return 15 <= len(text) <= 34 and int("".join(str(int(letter, 36)) for letter in text[4:] + text[:4])) % 97 == 1


def _public_address(found: re.Match) -> bool:
    try:
        return ipaddress.ip_address(found.group()).is_global or found.group().startswith("203.0.113.")
    except ValueError:
        return False


def _not_an_example(found: re.Match) -> bool:
    return not re.search(r"@(?:[\w-]+\.)*(?:example|test|domain|localhost|yourdomain)\.\w+$", found.group(), re.I)


_WRITTEN_BY_HAND = re.compile(
    r"your|example|xxx|\*\*\*|<|\{|change|insert|secret_?key$|password$|env|none|null|true|false", re.IGNORECASE
)


def _looks_random(found: re.Match) -> bool:
    """A value as people do not write it: letters and digits mixed, high entropy, no blank ("your_key_here", "****")."""
    value = found["value"]
    if _WRITTEN_BY_HAND.search(value):
        return False
    counts = Counter(value).values()
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts)
    mixed = bool(re.search(r"\d", value)) and bool(re.search(r"[A-Za-z]", value))
    return mixed and entropy >= 2.8


_INTERNATIONAL = r"(?<![\w+.-])\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){2,4}(?![\w-])"
_ASSIGNED = (
    r"(?i:\b(?:password|passwd|pwd|secret|client_secret|api[_-]?key|access[_-]?(?:key|token)|auth[_-]?token|token)\b"
    r"[\"']?\s*(?:=|:|=>|:=)\s*[\"']?)(?P<value>[^\s\"',;]{8,})"
)
_TABLE: list[tuple[str, str, str, Callable[[re.Match], bool]]] = [
    ("secret", "private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----", _always),
    ("secret", "AWS access key", r"\b(?:AKIA|ASIA|AGPA|AROA|AIDA)[0-9A-Z]{16}\b", _always),
    ("secret", "GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})\b", _always),
    ("secret", "GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}", _always),
    ("secret", "Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}", _always),
    ("secret", "Google key", r"\bAIza[A-Za-z0-9_-]{35}", _always),
    ("secret", "Hugging Face token", r"\bhf_[A-Za-z0-9]{30,}\b", _always),
    ("secret", "npm or PyPI token", r"\b(?:npm_[A-Za-z0-9]{36}|pypi-[A-Za-z0-9_-]{50,})", _always),
    ("secret", "Stripe key", r"\b[rs]k_(?:live|test)_[A-Za-z0-9]{16,}", _always),
    ("secret", "API key", r"\bsk-(?:ant-|proj-?)?[A-Za-z0-9_-]{20,}", _always),
    ("secret", "JSON web token", r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}", _always),
    ("secret", "password in a URL", r"\b[a-z][a-z0-9+.-]*://[^\s/:@]+:(?P<value>[^\s/:@]{3,})@[^\s/]+", _always),
    ("secret", "assigned secret", _ASSIGNED, _looks_random),
    ("personal", "e-mail address", r"\b[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]+\.)+[A-Za-z]{2,24}\b", _not_an_example),
    ("personal", "social security number", r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])", _always),
    ("personal", "payment card", r"(?<![\d.,-])[3-6]\d{3}(?:[ -]?\d{4}){2}[ -]?\d{1,7}(?![\d.,-]\d|\d)", _luhn),
    ("personal", "account number", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b", _iban),
    ("personal", "phone number", _INTERNATIONAL, _always),
    ("personal", "phone number", r"(?<![\w.+-])(?:\(\d{3}\) ?|\d{3}[.-])\d{3}[.-]\d{4}(?![\w-])", _always),
    ("personal", "network address", r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\w)", _public_address),
]
# what a match of a kind holds, one of these: to look for it takes a tenth of the time of the pattern
_HOLDS = {
    "private key": ("PRIVATE KEY",), "AWS access key": ("AKIA", "ASIA", "AGPA", "AROA", "AIDA"),
    "GitHub token": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"), "GitLab token": ("glpat-",),
    "Slack token": ("xox",), "Google key": ("AIza",), "Hugging Face token": ("hf_",),
    "npm or PyPI token": ("npm_", "pypi-"), "Stripe key": ("k_live_", "k_test_"), "API key": ("sk-",),
    "JSON web token": ("eyJ",), "password in a URL": ("://",), "assigned secret": ("=", ":"), "e-mail address": ("@",),
    "social security number": ("-",),
}  # fmt: skip
_RULES = [(group, kind, re.compile(pattern), check, _HOLDS.get(kind, ("",))) for group, kind, pattern, check in _TABLE]


def scan(text: str) -> list[Match]:
    """Every secret and personal datum in a text, left to right, without overlaps."""
    found = [
        Match(group, kind, *(each.span("value") if "value" in each.groupdict() else each.span()))
        for group, kind, pattern, check, holds in _RULES
        if any(part in text for part in holds)
        for each in pattern.finditer(text)
        if check(each)
    ]
    kept: list[Match] = []
    for match in found:  # in the order of the table: secrets before personal data
        if all(match.end <= other.start or match.start >= other.end for other in kept):
            kept.append(match)
    return sorted(kept, key=lambda match: match.start)


def redact(text: str) -> str:
    """The text with every match replaced by its kind in brackets."""
    for match in reversed(scan(text)):
        text = f"{text[: match.start]}[{match.kind}]{text[match.end :]}"
    return text


def find_private(
    conversations: Sequence[Conversation], groups: Sequence[str] = ("secret", "personal")
) -> list[Finding]:
    """One finding a row and kind, in any message of the row: filter `secret` or `personal`, detail the number found."""
    found = []
    for index, row in enumerate(conversations):
        kinds = Counter((match.group, match.kind) for message in row.messages for match in scan(message.content))
        for (group, kind), count in sorted(kinds.items()):
            if group in groups:
                found.append(finding(group, kind, index, row, detail=f"{count} found"))
    return found
