"""Broken and ambiguous pairs, each kind by rules whose precision and recall are measured (docs/data_quality.md).

empty         the answer has no content
placeholder   the answer is a template's blank ("TODO", "[insert answer here]")
refusal       the answer declines
truncated     the answer stops in the middle
script        the answer is in another script than the question, and no language was asked for
language      the same for languages in Latin script
missing_input the question speaks of a text that is not there
echo          the answer repeats the question

A response that the prompt itself offers ("say: No I can't") is never broken.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

from itune.data import languages, phrases, words
from itune.data.findings import Finding, finding
from itune.data.truncation import Endings
from itune.types import Conversation

ENDS = 240  # characters at both ends of a prompt, where instructions stand
KINDS = ("empty", "placeholder", "refusal", "truncated", "script", "language", "missing_input", "echo")


def find_broken(conversations: Sequence[Conversation], kinds: Collection[str] = KINDS) -> list[Finding]:
    """One finding a row and kind, for the first answer of the row that shows it. The filter is the kind's name."""
    rows = [(index, turn) for index, row in enumerate(conversations) for turn in words.turns(row)]
    rows = [(index, turn) for index, turn in rows if not _has_call(conversations[index], turn.index)]
    named = [_names(conversations[index]) for index, _ in rows]
    tasks, sources = [task for task, _ in named], [source for _, source in named]
    texts = [turn.response for _, turn in rows], [turn.prompt for _, turn in rows]
    endings = Endings(texts[0], tasks, sources, texts[1]) if "truncated" in kinds else None
    found: dict[tuple[int, str], Finding] = {}
    for (index, turn), (task, source) in zip(rows, named, strict=True):
        for kind, reason in _judge(turn, kinds):
            found.setdefault((index, kind), finding(kind, reason, index, conversations[index]))
        cut = endings.evidence(turn.response, task, source) if endings else ""
        if cut:
            found.setdefault((index, "truncated"), finding("truncated", cut, index, conversations[index]))
    return sorted(found.values(), key=lambda each: each.index)


def _has_call(row: Conversation, index: int) -> bool:
    message = row.messages[index]
    return bool(message.extra.get("tool_calls")) or message.weight == 0


def _names(row: Conversation) -> tuple[str, str]:
    return f"task:{row.metadata.get('task', '')}", f"source:{row.address.source}"


def _judge(turn: words.Turn, kinds: Collection[str]) -> list[tuple[str, str]]:
    response, normal = turn.response.strip(), words.normalise(turn.response)
    if is_empty(response):
        return [("empty", "the answer has no content")] if "empty" in kinds else []
    asked_for = bool(normal) and response.lower() in turn.context.lower()
    found = []
    if "placeholder" in kinds and not asked_for and phrases.PLACEHOLDER.match(response):
        found.append(("placeholder", f"the answer is {response[:40]!r}"))
    if "refusal" in kinds and not asked_for and refuses(response):
        found.append(("refusal", "the answer declines"))
    script = languages.other_script(turn.context, response) if "script" in kinds else ""
    spoken = languages.other_language(turn.prompt, response) if "language" in kinds and not script else ""
    if (script or spoken) and not languages.speaks_of_language(turn.context):  # looked at last: it takes longest
        kind, tongue = ("script", f"{script.capitalize()} script") if script else ("language", spoken)
        found.append((kind, f"the answer is in {tongue}"))
    if "missing_input" in kinds and turn.context == turn.prompt and misses_input(turn.prompt):
        found.append(("missing_input", "the question speaks of a text that is not there"))
    if "echo" in kinds and echoes(turn.prompt, response):
        found.append(("echo", "the answer repeats the question"))
    return found


def is_empty(text: str) -> bool:
    """Whether a text has neither letters, digits nor symbols."""
    blank = all(unicodedata.category(letter)[0] in "PZC" or letter in "~^`" for letter in text)
    return blank and not re.search(r"[?!_]", text)


def refuses(response: str) -> bool:
    """Whether a short answer, or the beginning of a longer one, declines to answer."""
    found = phrases.REFUSAL.search(phrases.NO_REFUSAL.sub("", response[:300]))
    return found is not None and found.start() < 120


def misses_input(prompt: str) -> bool:
    """Whether the prompt points at a text ("the following article") that it does not contain."""
    text = prompt.strip()
    if len(text) > 600 or "```" in text:
        return False
    if text.endswith(":") and text.count(":") == 1 and "\n" not in text and 4 <= len(text.split()) <= 40:
        return True
    sentences = [part.strip() for part in re.split(r"(?<=[.!?:])\s+|\n+", text) if part.strip()]
    pointing = [place for place, part in enumerate(sentences) if _points(part, sentences[:place])]
    if not pointing or any(len(sentences[place].split()) > 25 for place in pointing):
        return False
    rest = [part for place, part in enumerate(sentences) if place not in pointing and not _instructs(part)]
    quoted = re.search(r"[\"\u201c\u2018'`(\[{<]\s*\w+|https?://|\d[\d ,.+*/=x-]{3,}", text)
    return not rest and not quoted


def _points(sentence: str, before: Sequence[str]) -> bool:
    """Whether the sentence points at a text, and not at one that an earlier sentence asks to write."""
    found = phrases.POINTS.search(sentence) or phrases.WORKS_ON.search(sentence)
    if found and found.group().lower().startswith(("this", "these")) and len(sentence.split()) >= 10:
        return False  # the text may stand before it without a full stop
    return found is not None and not any(re.search(rf"\ban? (?:\w+ )*{phrases.INPUTS}\b", other) for other in before)


def _instructs(sentence: str) -> bool:
    return len(sentence.split()) <= 12 and bool(phrases.INSTRUCTS.match(sentence))


def echoes(prompt: str, response: str) -> bool:
    """Whether the answer is the prompt again, or a question of the prompt, and the prompt did not ask for that."""
    asked, answered = words.words(prompt), words.words(response)
    answered = answered[1:] if answered[:1] in (["question"], ["q"], ["instruction"], ["input"]) else answered
    if len(answered) < 4:
        return False
    if answered == asked or (len(asked) >= 5 and asked == answered[: len(asked)] and len(answered) <= len(asked) + 3):
        return True
    ends = prompt[:ENDS], prompt[-ENDS:]
    questions = [words.words(part) for part in re.split(r"(?<=[.?!:])\s+|\n+", prompt) if part.rstrip().endswith("?")]
    if answered in questions and not any(phrases.EDITS.search(end) for end in ends):
        return True
    inside = f" {' '.join(answered)} " in f" {' '.join(asked)} " and len(answered) > 0.8 * len(asked)
    return inside and not any(phrases.COPIES.search(end) for end in ends)
