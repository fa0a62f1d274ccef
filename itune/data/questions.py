"""When two prompts ask the same question, and whether a question has one right answer.

Two prompts ask the same when, after words that only wrap a request ("please", "could you tell me", "question:") are set
aside, their remaining words are the same stems in the same order, with at most one word more on one side, and the same
numbers and operators. Pairs are found by a commutative hash of the words, and by the hashes with one word left out, so
that the search over n rows is linear in the number of words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from itune.data import similarity, words

_WRAPPING = """
 a an the this that these those is are was were be been being am do does did done has have had having can could
will would shall should may might must i me my mine you your yours we us our it its they them their of and or so
then there here as at if any some just also very really what which please kindly thanks thank hi hello hey dear ok
okay sure help assist helpful assistant expert wonder wondering know tell let give provide want need like love
appreciate appreciated advance welcome care try trying question questions answer answers answering answered query
ask asks asking asked task tasks instruction instructions prompt prompts input output response respond reply
replies user human bot ai model system following follow follows below above given carefully read reading short
shortly brief briefly concise concisely quick quickly simple simply now today step steps think out correct
correctly right best suitable appropriate based according consider considering note regard regarding find
"""
_MEANING = frozenset(("not", "no", "never", "without", "none", "neither", "nor", "only", "except", "un"))
_ASKING = frozenset(("who", "whom", "whose", "where", "when", "why", "how", "many"))
_ORDER = """
first second third last next previous before after more less most least over under up down in from to with on off
he she his her him long often far
"""
_KEEP = _ASKING | frozenset(_ORDER.split())
STOP = frozenset(_WRAPPING.split()) - _KEEP
_TOKEN = re.compile(words.WORD.pattern + r"|[-+*/^%=<>≤≥≠√]")
_SENTENCE = re.compile(r"(?:[^.!?:\n]|:(?!\s))+[.!?:\n]*")

_GENERATE = (
    r"(?:write|generate|create|compose|draft|brainstorm|imagine|invent|suggest|recommend|propose|design|make|produce|"
    r"come up with|think of|build|develop|plan|describe|elaborate|discuss|summari[sz]e|sum up|paraphrase|rephrase|"
    r"rewrite|reword|expand|continue|complete the (?:story|lyrics|poem|paragraph)|share|role ?play|pretend|outline|"
    r"explain|guess|put the concepts together|tell (?:me|us) (?:a|an|some|about)|"
    r"(?:give|provide|list|show)(?: me| us)? (?:some|any|(?:an? )?(?:\w+ )?(?:examples?|ideas?|tips?|lists?|advice|"
    r"suggestions?|descriptions?|summary|overview|joke|story)))\b"
)
_POLITELY = r"(?:(?:can|could|would|will) you (?:please )?|(?:please|(?:want|need|like) you to|help me) )"
_OPENING = rf"(?:^|[.!?:\n]\s*|\b{_POLITELY})"
_ASKS_VIEW = r"\b(?:what|how) (?:are some|would you|do you (?:think|feel|like)|should i|can i)\b|\bin your opinion\b"
_ASKS_TEXT = (
    r"\b(?:joke|poem|haiku|story|essay|slogan|headline|title|tl;?dr|in a nutshell|tips|ideas|advice|cover letter|"
    r"summary|recipe|first sentence|key points|bullet points|short biography|movie plot|a sentence)\b"
)
_OPEN = re.compile(f"{_OPENING}{_GENERATE}|{_ASKS_VIEW}|{_ASKS_TEXT}", re.IGNORECASE)
_CHOICE = re.compile(
    r"\b(?:yes or no|true or false|positive or negative|negative or positive|options?|choices?|choose|select|pick|"
    r"which|answer the|(?:is|are|does|do|did|was|were|has|have) (?:this|that|the|these|it|they))\b",
    re.IGNORECASE,
)
_VERB_FIRST = r"(?:is|are|was|were|do|does|did|can|could|should|would|will|has|have|had|may|must)(?:n't)?\b"
_POLAR = re.compile(
    rf"(?:^|[.!?:,\n]\s*){_VERB_FIRST}[^.!\n]*\?"
    r"|\b(?:yes or no|true or false|yes\b.{1,12}\bno|whether|or not|paraphrase|same|duplicates?)\b",
    re.IGNORECASE,
)
HEAD = TAIL = 160  # an instruction stands at the beginning or at the end of a prompt


def open_ended(prompt: str) -> bool:
    """Whether the prompt asks for something that many different answers satisfy (a text, ideas, an opinion)."""
    ends = prompt.strip()[:HEAD], prompt.strip()[-TAIL:]
    return any(_OPEN.search(end) for end in ends) and not any(_CHOICE.search(end) for end in ends)


def polar(prompt: str) -> bool:
    """Whether the prompt may be answered with yes or no."""
    return any(_POLAR.search(end) for end in (prompt.strip()[:HEAD], prompt.strip()[-TAIL:]))


def tokens(text: str) -> list[str]:
    """Stems of the words that make a question what it is, number words as digits, operators, in order.

    Sentences without any such word ("Thanks in advance.") are left out.
    """
    folded = words.fold(text).replace("n't", " not").replace("cannot", "can not")
    kept: list[str] = []
    for sentence in _SENTENCE.findall(folded):
        found = [word for word in _TOKEN.findall(sentence) if word not in STOP]
        found = [words.NUMBER_WORDS.get(word) or words.stem(word) for word in found]
        if any(stem not in _KEEP or stem in _ASKING for stem in found):
            kept += [stem for stem in found if stem != "-"]
    return kept


def same_question(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two token lists are equal but for one more word on one side, which changes no meaning by itself.

    Parts of the text may have changed places as wholes: the question before or after the passage.
    """
    if len(left) < len(right):
        left, right = right, left
    if len(left) > len(right) + 1 or not right:
        return False
    if len(left) == len(right):
        return list(left) == list(right) or _rotated(left, right)
    place = next((i for i, word in enumerate(right) if left[i] != word), len(right))
    extra = left[place]
    harmless = extra not in _MEANING | _KEEP and not extra.isdigit() and len(right) >= 4
    return harmless and list(left[place + 1 :]) == list(right[place:])


def _rotated(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether a longer text is the other with its beginning moved to its end."""
    if len(left) < 12:
        return False
    first = right[0]
    return any(list(left[i:]) + list(left[:i]) == list(right) for i, word in enumerate(left) if word == first)


def same_question_pairs(rows: Sequence[Sequence[str]], most: int = 64) -> np.ndarray:
    """Candidate pairs (earlier row, later row): token multisets equal, or equal but for one more token. int64[n, 2].

    Of many rows with equal tokens each meets the `most` rows before it.
    """
    ids: dict[str, int] = {}
    encoded = [[ids.setdefault(word, len(ids)) for word in row] for row in rows]
    lengths = np.array([len(row) for row in encoded], np.int64)
    row_of_word = np.repeat(np.arange(len(rows)), lengths)
    words_flat = np.array([number for row in encoded for number in row], np.int64)
    values = similarity.mix(np.arange(1, len(ids) + 1, dtype=np.uint64))
    totals = np.zeros(len(rows), np.uint64)
    np.add.at(totals, row_of_word, values[words_flat])
    order = np.argsort(totals, kind="stable")
    order = order[lengths[order] > 0]
    ordered = totals[order]
    shorter = totals[row_of_word] - values[words_flat]  # every row with one of its words left out
    at = np.searchsorted(ordered, shorter)
    hit = np.nonzero((lengths[row_of_word] > 4) & (at < len(ordered)))[0]
    hit = hit[ordered[at[hit]] == shorter[hit]]
    runs = np.minimum(np.searchsorted(ordered, shorter[hit], "right") - at[hit], most)
    within = np.arange(runs.sum()) - np.repeat(np.cumsum(runs) - runs, runs)
    longer, other = np.repeat(row_of_word[hit], runs), order[np.repeat(at[hit], runs) + within]
    one_more = np.stack([np.minimum(longer, other), np.maximum(longer, other)], axis=1)
    return np.unique(np.concatenate([_adjacent(order, ordered, most), one_more]), axis=0)


def _adjacent(order: np.ndarray, ordered: np.ndarray, most: int) -> np.ndarray:
    """Pairs of rows with equal keys; in a long run each row meets the `most` rows before it."""
    starts = np.nonzero(np.append(True, ordered[1:] != ordered[:-1]))[0] if len(ordered) else np.zeros(0, np.int64)
    place = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order))))
    found = [np.zeros((0, 2), np.int64)]
    for back in range(1, min(most, int(place.max(initial=0))) + 1):
        here = np.nonzero(place >= back)[0]
        found.append(np.stack([order[here - back], order[here]], axis=1))
    return np.concatenate(found)
