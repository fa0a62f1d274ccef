"""What was won and what was lost: the question, and both answers side by side."""

from __future__ import annotations

import hashlib
import html
from collections.abc import Mapping, Sequence
from typing import Any

from itune.evaluators.paired import matched

SHOWN = 6  # of each kind
LONGEST = 1500  # characters of a text


def side_by_side(base: Sequence[Mapping[str, Any]], tuned: Sequence[Mapping[str, Any]],
                 names: tuple[str, str] = ("base", "tuned")) -> str:  # fmt: skip
    """Up to SHOWN wins, losses and draws of each kind, chosen by a hash of the question and not by how they look.

    Losses come first: they are what a reader should not miss. "" where the items have no answers.
    """
    before, after, _ = matched(base, tuned)
    pairs = [(b, t) for b, t in zip(before, after, strict=True) if isinstance(t.get("answer"), str) and "score" in t]
    if not pairs:
        return ""
    kinds = (("Lost", lambda b, t: t["score"] < b["score"]), ("Won", lambda b, t: t["score"] > b["score"]),
             ("Wrong both times", lambda b, t: t["score"] == b["score"] and t["score"] < 1),
             ("Right both times", lambda b, t: t["score"] == b["score"] == 1))  # fmt: skip
    text = ""
    for place, (title, belongs) in enumerate(kinds):
        chosen = sorted((pair for pair in pairs if belongs(*pair)), key=lambda pair: _hash(pair[1]))
        if not chosen:
            continue
        most = SHOWN if place < 2 else SHOWN // 2
        body = "".join(_pair(b, t, names) for b, t in chosen[:most])
        of = f"{len(chosen)}" if len(chosen) <= most else f"{most} of {len(chosen)}"
        text += f"<details{' open' if place < 2 else ''}><summary>{title} ({of})</summary>{body}</details>"
    return text


def _hash(item: Mapping[str, Any]) -> str:
    return hashlib.sha256(f"{item.get('address')} {item.get('prompt')}".encode()).hexdigest()


def _pair(base: Mapping[str, Any], tuned: Mapping[str, Any], names: tuple[str, str]) -> str:
    both = "".join(
        f'<div><span class="label {color}">{html.escape(name)}</span> {_mark(item)}'
        f'<div class="text">{_text(item["answer"])}</div></div>'
        for name, color, item in zip(names, ("one", "two"), (base, tuned))
    )
    where = html.escape(f"{tuned.get('category', '')} · {tuned.get('address', '')}")
    expected = tuned.get("reference") or ""
    wanted = f'<span class="label">expected</span><div class="text">{_text(expected)}</div>' if expected else ""
    asked = f'<span class="label">asked · {where}</span><div class="text">{_text(str(tuned.get("prompt", "")))}</div>'
    return f'<div class="pair">{asked}{wanted}<div class="both">{both}</div></div>'


def _mark(item: Mapping[str, Any]) -> str:
    score = item["score"]
    if score in (0, 1):
        return '<span class="good">right</span>' if score else '<span class="bad">wrong</span>'
    return f'<span class="dim">score {score:.2f}</span>'


def _text(text: str) -> str:
    if not text.strip():
        return '<span class="dim">(nothing)</span>'
    more = f" ... ({len(text):,} characters)" if len(text) > LONGEST else ""
    return html.escape(text[:LONGEST] + more)
