"""Text as the filters see it: normalised words, light stems, numbers, and the turns of a conversation.

Pure functions of text. What the filters call "the same text" is decided here once, so that duplicates, contradictions
and held-out matches agree with each other.
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterator
from typing import NamedTuple

from itune.types import Conversation

# letters of scripts that are written without spaces between words count as one word each
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:'[^\W\d_{_UNSPACED}]+)*")
_SIGN = "(?<![\\w.])[-\u2212]?"
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:e[-+]?\d+)?"
_NUMBER = re.compile(rf"{_SIGN}{_DIGITS}|{_SIGN}\.\d+", re.IGNORECASE)
_INVISIBLE = dict.fromkeys([0x00AD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF]) | {0x2019: "'", 0x2018: "'"}

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety"
)
NUMBER_WORDS = {
    word: str(value if value <= 20 else 10 * (value - 18)) for value, word in enumerate(_UNITS.split())
}


class Turn(NamedTuple):
    """One answer of the assistant: all that came before it, the last user message, the answer, its message index."""

    context: str
    prompt: str
    response: str
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls


def fold(text: str) -> str:
    """NFKC, case folded, invisible characters removed, typographic apostrophes straightened."""
    if text.isascii():
        return text.lower()
    return unicodedata.normalize("NFKC", text).translate(_INVISIBLE).casefold()


def words(text: str) -> list[str]:
    """The folded words in order; punctuation is left out, letters of unspaced scripts are one word each."""
    return WORD.findall(fold(text))


def spans(folded: str) -> list[tuple[int, int]]:
    """Where the words of a folded text stand in it: (start, end) of each."""
    return [found.span() for found in WORD.finditer(folded)]


def normalise(text: str) -> str:
    """The folded words joined by single spaces: texts that differ by case, spacing or punctuation become equal."""
    return " ".join(words(text))


def numbers(text: str) -> list[str]:
    """Numbers written in digits, in order and in one spelling: "1,000" and "1000.0" are both "1000"."""
    return [_canonical(found) for found in _NUMBER.findall(text)]


def _canonical(written: str) -> str:
    value = float(written.replace(",", "").replace("\u2212", "-"))
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


@functools.lru_cache(maxsize=1 << 16)
def stem(word: str) -> str:
    """The word without its inflection, roughly: enough to see that "plans", "planned" and "planning" are one word."""
    word = word[:-2] if word.endswith("'s") else word
    if len(word) > 5 and word.endswith("ing"):
        return _undouble(word[:-3])
    if len(word) > 4 and word.endswith("ied"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith("ed"):
        return _undouble(word[:-2])
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ses", "xes", "zes", "ches", "shes")):
        return word[:-2].rstrip("e")
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1].rstrip("e")
    return word.rstrip("e") if len(word) > 3 else word


def _undouble(word: str) -> str:
    doubled = len(word) > 3 and word[-1] == word[-2] and word[-1] not in "lsz"
    return word[:-1] if doubled else word.rstrip("e")


def turns(conversation: Conversation) -> Iterator[Turn]:
    """Every assistant message with what came before it. Tool results count as context."""
    seen: list[str] = []
    prompt = ""
    for index, message in enumerate(conversation.messages):
        if message.role == "assistant":
            yield Turn("\n".join(seen), prompt, message.content, index)
        elif message.role == "user":
            prompt = message.content
        seen.append(message.content)


def prompt_text(conversation: Conversation) -> str:
    """All user messages, one a line group: what a held-out item asks."""
    return "\n".join(message.content for message in conversation.messages if message.role == "user")


def prompt_digest(row: Conversation) -> str:
    """SHA-256 of the normalised prompt, as `heldout_proof.json` has it."""
    return hashlib.sha256(normalise(prompt_text(row)).encode()).hexdigest()


def whole_text(conversation: Conversation) -> str:
    """User and assistant messages; system prompts are left out, since thousands of rows share one."""
    return "\n".join(message.content for message in conversation.messages if message.role in ("user", "assistant"))
