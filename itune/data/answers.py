"""Whether two answers to the same question can both be right.

They cannot when they give another label, option, final answer or number, when one negates the other or says the
opposite in nearly the same words, or when they have nothing in common. Answers that contain one another agree. For
questions that many answers satisfy, having nothing in common proves nothing, unless one answer has nothing in common
with the question either.
"""

from __future__ import annotations

import dataclasses
import difflib
import re

from itune.data import questions, words

SHORT = 8  # words of an answer that is a phrase rather than a text

_YES = "yes yeah yep true correct right agree positive entailment acceptable duplicates"
_NO = "no nope false incorrect wrong disagree negative contradiction unacceptable"
_SIDE = {words.stem(word): side for side, group in enumerate((_NO, _YES)) for word in group.split()}
_ANNOUNCED = re.compile(
    r"^(?:(?:the |my )?(?:final |correct |right |best )?(?:answer|response|output|reply)\s*(?:is|:|would be)+\s*|a: )",
    re.IGNORECASE,
)
_OPTION = re.compile(r"^\W*(?:option |choice |answer:? )?\(?([a-h])(?:[).:]\s|[).:]?\W*$)", re.IGNORECASE)
_FINAL = re.compile(r"(?:answer|result|total|solution)\s*(?:is|are|was|:|=)+\s*([^\n]{0,60})|####(.+)", re.IGNORECASE)
_COUNT = re.compile(r"\bhow (?:many|much|old|long|far|tall)\b|\bcalculate\b|\bwhat (?:year|percentage)\b", re.I)
_SPELLED = re.compile(rf"\b(?:{'|'.join(word for word in words.NUMBER_WORDS if word != 'one')})\b", re.IGNORECASE)
_NEGATION = frozenset(("not", "no", "never", "without", "none", "neither", "nor", "cannot", "nobody", "nothing"))
_FILLER = questions.STOP | _NEGATION | {"only", "except", "un"}
_PAIRS = """
increase/decrease more/less higher/lower high/low hot/cold warm/cool up/down before/after left/right above/below
buy/sell open/close start/stop start/end first/last best/worst good/bad better/worse early/late inside/outside
rise/fall large/small big/small long/short old/young true/false yes/no positive/negative always/never all/none
accept/reject win/lose gain/loss legal/illegal possible/impossible likely/unlikely safe/dangerous male/female
north/south east/west add/subtract day/night strong/weak strengthen/weaken fast/slow faster/slower thick/thin
near/far success/failure support/oppose allow/forbid grow/shrink maximum/minimum most/least many/few
satisfied/dissatisfied happy/sad appropriate/inappropriate agree/disagree equivalent/different same/different
easier/harder harder/softer easy/difficult cause/prevent wet/dry light/dark light/heavy
"""
ANTONYMS = frozenset(frozenset(words.stem(word) for word in pair.split("/")) for pair in _PAIRS.split())


@dataclasses.dataclass(frozen=True)
class Answer:
    """An answer taken apart once: normalised text, stems, numbers."""

    text: str
    normal: str
    stems: tuple[str, ...]
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, text: str) -> Answer:
        text = _ANNOUNCED.sub("", text.strip(), count=1)
        found = words.words(text.replace("n't", " not").replace("n\u2019t", " not").replace("cannot", "can not"))
        stems = tuple(words.NUMBER_WORDS.get(word) or words.stem(word) for word in found)
        return cls(text, " ".join(found), stems, tuple(numbers_of(text)))

    @property
    def content(self) -> tuple[str, ...]:
        return tuple(stem for stem in self.stems if stem not in _FILLER)


def numbers_of(text: str) -> list[str]:
    """Numbers of the text in order, those spelled as words too; "one" is hardly ever meant as a number."""
    return words.numbers(_SPELLED.sub(lambda found: words.NUMBER_WORDS[found.group().lower()], text))


def incompatible(left: Answer, right: Answer, prompt: str, open_ended: bool) -> str:
    """Why two answers to the same question cannot both be right, or "" where they can."""
    if not left.normal or not right.normal or left.normal == right.normal:
        return ""
    open_ended = open_ended or (left.text.endswith("?") and right.text.endswith("?"))
    sides = [_SIDE.get(answer.stems[0]) for answer in (left, right)]
    if None not in sides and (sides[0] != sides[1] or min(len(left.stems), len(right.stems)) <= 3):
        return "label" if sides[0] != sides[1] else ""
    options = [_OPTION.match(answer.text) for answer in (left, right)]
    if options[0] and options[1]:
        return "option" if options[0][1].lower() != options[1][1].lower() else ""
    alike = _jaccard(_plain(left), _plain(right))
    if _negations(left) != _negations(right) and alike > 0.85:
        return "negation"
    finals = [_final(answer, prompt) for answer in (left, right)]
    if finals[0] and finals[1]:
        return "final answer" if finals[0] != finals[1] else ""
    return _small_difference(left, right, alike, 0.8 if open_ended else 0.5) or (
        "" if _contained(left, right) else _unrelated(left, right, prompt) if open_ended else _divergent(left, right,
        prompt)
    )


def _final(answer: Answer, prompt: str) -> str:
    """The number that the answer ends in, where it announces one or the question asks for one."""
    stated = [number for found in _FINAL.findall(answer.text)[-1:] for number in words.numbers(" ".join(found))]
    if stated:
        return stated[0]
    asked = _COUNT.search(prompt[-questions.TAIL :])
    return answer.numbers[-1] if asked and answer.numbers and len(answer.stems) <= 40 else ""


def _plain(answer: Answer) -> frozenset[str]:
    return frozenset(stem for stem in answer.stems if stem not in _NEGATION and not stem[0].isdigit())


def _negations(answer: Answer) -> int:
    return sum(stem in _NEGATION for stem in answer.stems) % 2


def _jaccard(left: frozenset[str], right: frozenset[str]) -> float:
    return len(left & right) / len(left | right) if left or right else 1.0


def _small_difference(left: Answer, right: Answer, alike: float, floor: float) -> str:
    """What differs between answers in nearly the same words: numbers, a negation, an opposite, a name."""
    only_left, only_right = set(left.stems) - set(right.stems), set(right.stems) - set(left.stems)
    numbers = set(left.numbers) - set(right.numbers), set(right.numbers) - set(left.numbers)
    if numbers[0] and numbers[1] and alike > floor:
        return "number"
    if _negations(left) != _negations(right) and alike > max(0.7, floor):
        return "negation"
    close = alike > floor or max(len(left.stems), len(right.stems)) <= SHORT
    pairs = [pair for one in only_left for other in only_right for pair in ((one, other), (other, one))]
    if close and any(one == prefix + other for one, other in pairs for prefix in ("un", "in", "dis", "non")):
        return "opposite"
    if alike > floor and any(frozenset((one, other)) in ANTONYMS for one in only_left for other in only_right):
        return "opposite"
    if alike > max(0.6, floor) and _named(left, only_left) and _named(right, only_right):
        return "name"
    return ""


def _named(answer: Answer, only: set[str]) -> bool:
    """Whether one of these stems is written with a capital inside a sentence."""
    inside = re.findall(r"(?<=[a-z,;] )[A-Z][\w-]+", answer.text)
    return any(words.stem(word.casefold()) in only for word in inside)


def _contained(left: Answer, right: Answer) -> bool:
    """Whether one answer says all that the other says, or is its abbreviation or another spelling of it."""
    one, other = set(left.content), set(right.content)
    if one and other and (one <= other or other <= one):
        return True
    short, long = sorted((left, right), key=lambda answer: len(answer.normal))
    if short.normal in long.normal and len(short.normal) > 2:
        return True
    spelled = long.normal.split()
    initials = {"".join(word[0] for word in spelled if word not in left_out) for left_out in ((), ("and", "of", "the"))}
    if len(short.normal) > 1 and short.normal.replace(" ", "") in initials:
        return True
    return len(long.normal) <= 80 and difflib.SequenceMatcher(None, short.normal, long.normal).ratio() > 0.8


def _divergent(left: Answer, right: Answer, prompt: str) -> str:
    """Answers that share too little of what they add to the question."""
    if _COUNT.search(prompt[-questions.TAIL :]) and bool(left.numbers) != bool(right.numbers):
        return "divergent"
    asked = set(questions.tokens(prompt))
    one, other = set(left.content), set(right.content)
    if not one or not other:
        bare, full = (left, other) if not one else (right, one)
        return "divergent" if full and bare.stems[0] in _SIDE and not (questions.polar(prompt) and full & asked) else ""
    if one - asked and other - asked:
        one, other = one - asked, other - asked
    shared = len(one & other) / min(len(one), len(other))
    limit = 0.5 if max(len(left.stems), len(right.stems)) <= SHORT else 0.2
    return "divergent" if shared < limit else ""


def _unrelated(left: Answer, right: Answer, prompt: str) -> str:
    """For questions that many answers satisfy: one answer takes up the words of the question, the other hardly any."""
    asked = {stem for stem in questions.tokens(prompt) if len(stem) > 2}
    one, other = set(left.content), set(right.content)
    if not asked or len(one & other) > 0.1 * min(len(one), len(other)):
        return ""
    shares = sorted((len(content & asked) / max(1, len(content)), len(content & asked)) for content in (one, other))
    lengths = sorted((len(left.stems), len(right.stems)))
    apart = shares[0][1] == 0 or (shares[1][0] >= 0.3 and shares[0][0] <= 0.1)
    tiny = shares[0][1] == 0 and lengths[0] <= 3 and lengths[1] >= 20
    return "unrelated" if tiny or (apart and shares[1][1] >= 2 and lengths[1] >= 5) else ""
