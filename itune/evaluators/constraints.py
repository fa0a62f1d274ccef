"""Constraints that a program can verify, in the style of IFEval (Zhou et al. 2023, arXiv 2311.07911), offline.

Names and arguments are IFEval's, so that its rows can be used as they are: the metadata of an item holds
`instruction_id_list` and `kwargs`, one mapping a constraint. Where IFEval needs downloads (NLTK's sentence splitter,
langdetect) there are rules here: a sentence ends at . ! ? before a space, a language is told by script and function
words.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from itune.data.languages import language, scripts
from itune.types import InputError

Check = Callable[..., bool]
CHECKS: dict[str, Check] = {}
_SENTENCE_END = re.compile(r"[.!?]+[\"'\u201d\u2019)\]]*(?=\s|$)")
_NO_END = re.compile(r"\b(?:mr|mrs|ms|dr|prof|st|jr|sr|vs|etc|e\.g|i\.e|no|fig|[A-Z])\.$", re.IGNORECASE)
_CODES = {
    "en": "English", "es": "Spanish", "fr": "French", "de": "German", "it": "Italian", "pt": "Portuguese",
    "nl": "Dutch", "sv": "Swedish", "da": "Danish", "pl": "Polish", "tr": "Turkish", "id": "Indonesian",
    "ro": "Romanian", "cs": "Czech", "fi": "Finnish", "hu": "Hungarian", "vi": "Vietnamese",
}  # fmt: skip
_SCRIPTS = {
    "ru": "CYRILLIC", "bg": "CYRILLIC", "uk": "CYRILLIC", "hi": "DEVANAGARI", "mr": "DEVANAGARI", "ne": "DEVANAGARI",
    "ar": "ARABIC", "fa": "ARABIC", "ur": "ARABIC", "bn": "BENGALI", "pa": "GURMUKHI", "gu": "GUJARATI",
    "ta": "TAMIL", "te": "TELUGU", "kn": "KANNADA", "th": "THAI", "ko": "HANGUL", "ja": "CJK", "zh": "CJK",
    "zh-cn": "CJK", "el": "GREEK", "he": "HEBREW",
}  # fmt: skip


def score(item: Mapping[str, Any], answer: str) -> bool:
    """Every constraint of the item holds for the answer as it is (strict)."""
    return all(results(item, answer, loose=False).values())


def loose(item: Mapping[str, Any], answer: str) -> bool:
    """Every constraint holds for the answer or for one of its readings: see `readings`."""
    return all(results(item, answer, loose=True).values())


def results(item: Mapping[str, Any], answer: str, loose: bool) -> dict[str, bool]:
    """{constraint: held} of an item; an empty answer keeps none. Raises InputError for a constraint not known."""
    metadata = item.get("metadata", {})
    names = metadata.get("instruction_id_list")
    if not names:
        raise InputError(f"{item.get('address', 'item')}: no instruction_id_list in its metadata; expected names "
                         f"of constraints, such as {', '.join(list(CHECKS)[:3])}")
    given = metadata.get("kwargs") or [{}] * len(names)
    found: dict[str, bool] = {}
    for number, (name, arguments) in enumerate(zip(names, given, strict=True)):
        check = find(name)
        wanted = {key: value for key, value in (arguments or {}).items() if value is not None}
        texts = readings(answer) if loose else [answer]
        try:
            held = any(text.strip() and check(text, **wanted) for text in texts)
        except TypeError as error:
            raise InputError(f"{item.get('address', 'item')}: constraint {name}: {error}") from error
        found[name if name not in found else f"{name} ({number + 1})"] = bool(held)
    return found


def readings(answer: str) -> list[str]:
    """The answer, without its first line, last line or both, and each of these without asterisks."""
    lines = answer.split("\n")
    cut = [answer, *("\n".join(part).strip() for part in (lines[1:], lines[:-1], lines[1:-1]))]
    return [*cut, *(text.replace("*", "") for text in cut)]


def find(name: str) -> Check:
    """The check of this name. Raises InputError with the nearest one."""
    if name in CHECKS:
        return CHECKS[name]
    near = difflib.get_close_matches(name, CHECKS, n=1)
    raise InputError(f"constraint {name!r} is not known; " + (f"did you mean {near[0]}?" if near else
                     f"there are {', '.join(CHECKS)}"))


def _check(name: str) -> Callable[[Check], Check]:
    def enter(function: Check) -> Check:
        CHECKS[name] = function
        return function

    return enter


def _compare(count: int, relation: str, limit: int) -> bool:
    """IFEval knows `less than` and `at least`; `at most` and `exactly` are ours."""
    outcomes = {"less than": count < limit, "at least": count >= limit, "at most": count <= limit,
                "exactly": count == limit}  # fmt: skip
    if relation not in outcomes:
        raise InputError(f"constraint: relation {relation!r}; expected one of {', '.join(outcomes)}")
    return outcomes[relation]


def sentences(text: str) -> int:
    """How many sentences a text has: ends of . ! ? before white space, without those of abbreviations and initials."""
    count, last = 0, 0
    for match in _SENTENCE_END.finditer(text):
        if match.end() < len(text.rstrip()) and _NO_END.search(text[last : match.end()]):
            continue
        count, last = count + 1, match.end()
    return count + bool(text[last:].strip())


@_check("keywords:existence")
def _has_keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(_pattern(word), text, re.IGNORECASE) for word in keywords)


def _pattern(word: str) -> str:
    """A keyword as a regular expression, which it is to IFEval; one that is none stands for itself."""
    try:
        re.compile(word)
    except re.error:
        return re.escape(word)
    return word


@_check("keywords:frequency")
def _keyword_frequency(text: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _compare(len(re.findall(_pattern(keyword.strip()), text, re.IGNORECASE)), relation, frequency)


@_check("keywords:forbidden_words")
def _no_forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{_pattern(word)}\b", text, re.IGNORECASE) for word in forbidden_words)


@_check("keywords:letter_frequency")
def _letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


@_check("language:response_language")
def _in_language(text: str, language: str) -> bool:
    return speaks(text, language)


def speaks(text: str, code: str) -> bool:
    """The text is in the language of this ISO 639-1 code, by its script, or its function words where that is Latin."""
    found = scripts(text)
    main = max(found, key=lambda name: found[name]) if found else ""
    if code in _SCRIPTS:
        return main == _SCRIPTS[code]
    if code not in _CODES:
        raise InputError(f"constraint language:response_language: {code!r} is not known; expected one of "
                         f"{', '.join([*_CODES, *_SCRIPTS])}")
    return main == "LATIN" and language(text)[0] in (_CODES[code], "")


@_check("length_constraints:number_sentences")
def _number_sentences(text: str, num_sentences: int, relation: str = "at least") -> bool:
    return _compare(sentences(text), relation, num_sentences)


@_check("length_constraints:number_paragraphs")
def _number_paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    parts = parts[1:] if parts and not parts[0] else parts
    parts = parts[:-1] if parts and not parts[-1] else parts
    return all(parts) and len(parts) == num_paragraphs


@_check("length_constraints:number_words")
def _number_words(text: str, num_words: int, relation: str = "at least") -> bool:
    return _compare(len(re.findall(r"\w+", text)), relation, num_words)


@_check("length_constraints:nth_paragraph_first_word")
def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = re.split(r"\n\n", text)
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    part = parts[nth_paragraph - 1].split()
    return bool(part) and re.split(r"[.,?!'\"]", part[0].lstrip("'").lstrip('"'))[0].lower() == first_word.lower()


@_check("detectable_content:number_placeholders")
def _placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


@_check("detectable_content:postscript")
def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return bool(re.search(known.get(marker, re.escape(marker.lower())), text.lower()))


@_check("detectable_format:number_bullet_lists")
def _bullets(text: str, num_bullets: int) -> bool:
    stars, dashes = (re.findall(line, text, re.MULTILINE) for line in (r"^\s*\*[^*].*$", r"^\s*-.*$"))
    return len(stars) + len(dashes) == num_bullets  # apart: the character after an asterisk may be a line's end


@_check("detectable_format:constrained_response")
def _one_of(text: str, options: tuple[str, ...] = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
            ) -> bool:  # fmt: skip
    return any(option in text for option in options)


@_check("detectable_format:number_highlighted_sections")
def _highlights(text: str, num_highlights: int) -> bool:
    single = [found for found in re.findall(r"\*[^\n*]*\*", text) if found.strip("*").strip()]
    double = [found for found in re.findall(r"\*\*[^\n*]*\*\*", text) if found.strip("*").strip()]
    return len(single) + len(double) >= num_highlights


@_check("detectable_format:multiple_sections")
def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", text)) >= num_sections


@_check("detectable_format:json_format")
def _json(text: str) -> bool:
    inside = re.sub(r"^```(?:json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(inside)
    except (ValueError, RecursionError):
        return False
    return True


@_check("detectable_format:title")
def _title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


@_check("combination:two_responses")
def _two(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    inner = [part for at, part in enumerate(parts) if part or at not in (0, len(parts) - 1)]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


@_check("combination:repeat_prompt")
def _repeats(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_check("startend:end_checker")
def _ends(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_check("startend:quotation")
def _quoted(text: str) -> bool:
    inner = text.strip()
    return len(inner) > 1 and inner[0] == inner[-1] == '"'


@_check("change_case:capital_word_frequency")
def _capital_words(text: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    return _compare(sum(word.isupper() for word in re.findall(r"[^\W_]+(?:[-'][^\W_]+)*", text)), capital_relation,
                    capital_frequency)  # fmt: skip


@_check("change_case:english_capital")
def _upper(text: str) -> bool:
    return text.isupper() and speaks(text.lower(), "en")


@_check("change_case:english_lowercase")
def _lower(text: str) -> bool:
    return text.islower() and speaks(text, "en")


@_check("punctuation:no_comma")
def _no_comma(text: str) -> bool:
    return "," not in text
