"""Answers that stop in the middle, told by how the other answers of their task end.

Evidence: an open code block or bracket; a last word that only begins a known word; a last word that cannot end a
sentence; or no final punctuation where the answers of the task, or of the source, nearly always have it.
"""

from __future__ import annotations

import bisect
import collections
import re
from collections.abc import Sequence

_UNFINISHED = """
a an the of to in at by for with from and or but nor because although while if when where which who whose that than as
is are was were be been being have has had will would can could should may might must do does did very his her its their
our your my these those into onto between during without within
"""
_FUNCTION = frozenset(_UNFINISHED.split())
_ENDED = re.compile(r"[.!?\u2026\u3002\uff01\uff1f\u061f\u0964:;)\]}>\"\u201d\u2019'`*_~|/\\%\u00b0\u2605\u2606]$")
_MIDDLE = re.compile(r"(?:[,(\[{&+=<\u201c\u00a1\u00bf\u2013\u2014]|[^\W_]-|\s[-/*$])$")
_SENTENCE_END = re.compile(r"[^\W\d_][.!?][\"\u201d')]?\s+(?=[A-Z\u00c0-\u00dd\"\u201c])|\s\.\s")
_SPEAKER = re.compile(r"^\s*[\w .'-]{1,30}:")
_LIST_LINE = re.compile(r"^\s*(?:[-*\u2022\u00b7]|\d+[.)]|[a-zA-Z][.)])\s")
_WORD = re.compile(r"[^\W\d_]+")
_CODE = re.compile(r"```|^\s*(?:def|class|import|from|function|var|let|const|SELECT|<\w+|[{}();]+)", re.MULTILINE)
_LAST = re.compile(r"(?:^|[\s(\"'\u201c-])([^\W\d_]+)$")
LEAST_WORDS = 8  # shorter answers are phrases and need no full stop
ENOUGH = 4  # answers of a task before its habit says anything
HABIT = 0.8  # share of a task's answers that end in punctuation


class Endings:
    """What the answers of a data set show: the words they use, and by task how often they end in punctuation."""

    def __init__(
        self, answers: Sequence[str], tasks: Sequence[str], sources: Sequence[str], prompts: Sequence[str]
    ) -> None:
        rows_with: collections.Counter[str] = collections.Counter()
        for text in (*answers, *prompts):
            found = {word.lower() for word in _WORD.findall(text)}
            last = _LAST.search(text)
            rows_with.update(found - ({last[1].lower()} if last else set()))
        self.known = {word for word, count in rows_with.items() if count >= 2}
        self.sorted = sorted(self.known)
        self.habit: dict[str, float] = {}
        for names in (sources, tasks):
            ended: dict[str, list[bool]] = collections.defaultdict(list)
            for text, name in zip(answers, names, strict=True):
                if len(text.split()) >= LEAST_WORDS:
                    ended[name].append(bool(_ENDED.search(text.rstrip())))
            known = {name: each for name, each in ended.items() if len(each) >= ENOUGH}
            self.habit |= {name: (sum(each) + 0.5) / (len(each) + 1) for name, each in known.items()}

    def begins_a_word(self, word: str) -> bool:
        """Whether an unknown word is the beginning of a known one."""
        word = word.lower()
        if word in self.known or len(word) < 2:
            return False
        place = bisect.bisect_left(self.sorted, word)
        return place < len(self.sorted) and self.sorted[place].startswith(word)

    def evidence(self, answer: str, task: str, source: str) -> str:
        """Why this answer looks cut off, or ""."""
        text = answer.rstrip()
        count = len(text.split())
        if text.count("```") % 2:
            return "open code block"
        if count < LEAST_WORDS:
            return ""
        if _MIDDLE.search(text) and not _CODE.search(text):
            return "ends in the middle of a sentence"
        if _ENDED.search(text):
            return ""
        if _CODE.search(text):
            return ""
        last = _LAST.search(text)
        if last and last[1].islower() and last[1] in _FUNCTION:
            return "ends in the middle of a sentence"
        habit = self.habit.get(task, self.habit.get(source, 0.0))
        lines = text.splitlines()
        open_lines = any(not _ENDED.search(line.rstrip()) for line in lines[:-1])
        listed = bool(_LIST_LINE.match(lines[-1])) and open_lines
        if last and self.begins_a_word(last[1]) and not listed and (habit >= 0.5 or last[1].islower()):
            return "ends in the middle of a word"
        pairs = ("(", ")"), ("[", "]"), ("\u201c", "\u201d")
        opened = any(text.count(left) > text.count(right) for left, right in pairs) or text.count('"') % 2 == 1
        if opened and not listed and habit >= 0.5:
            return "open bracket or quotation"
        if habit >= HABIT and not listed:
            return "no final punctuation, unlike its task"
        own = len(_SENTENCE_END.findall(text)) >= 2 and not _SPEAKER.search(lines[-1]) and not listed
        return "no final punctuation, unlike its own sentences" if own and habit >= 0.3 else ""
