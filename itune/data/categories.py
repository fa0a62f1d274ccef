"""What kind of task a row is: creative, analytical, factual, coding, conversation, safety, other.

Decided by the row's own label, then by its source's default, then by rules on the instruction, else unknown. Labels of
other taxonomies (WildBench, MT-Bench, Dolly, FLAN-style task names) are mapped to ours.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from itune.data import words
from itune.types import Conversation, InputError

CATEGORIES = ("creative", "analytical", "factual", "coding", "conversation", "safety", "other", "unknown")

_ALIASES = {
    "creative": "creative writing, writing, role playing, roleplay, brainstorming, editing, story, poetry, poem, "
    "rewriting, creative tasks, generation, humor, joke, text generation, ideation",
    "analytical": "math, maths, mathematics, reasoning, planning, data analysis, logic, classification, extraction, "
    "information extraction, summarization, summarisation, closed qa, arithmetic, puzzle, planning & "
    "reasoning, math & data analysis, translation, nli, sentiment, analysis, word problem",
    "factual": "information seeking, advice seeking, open qa, general qa, qa, question answering, knowledge, "
    "stem, humanities, information/advice seeking, trivia, facts, explanation, science, history",
    "coding": "coding & debugging, code, programming, debugging, software, sql",
    "conversation": "chat, chitchat, small talk, dialogue, multi-turn, social, emotional support",
    "safety": "harmful, refusal, jailbreak, toxicity, ethics, red teaming, harmlessness, moderation",
    "other": "others, misc, miscellaneous, none of the above",
}
_OF_LABEL = {name: name for name in CATEGORIES} | {
    alias.strip(): name for name, listed in _ALIASES.items() for alias in listed.split(",")
}

# what the first verb of an instruction asks for
_VERBS = {
    "creative": "write compose draft create generate brainstorm suggest design invent imagine make plan rewrite "
    "rephrase paraphrase reword expand edit polish come complete pretend turn add use continue propose",
    "analytical": "calculate compute solve solving sort rank classify categorize categorise compare contrast analyze "
    "analyse extract identify find detect select choose pick summarize summarise translate convert converting parse "
    "replace fill determine decide predict count evaluate prove derive infer link match order arrange "
    "label verify estimate",
    "factual": "explain describe define what who when where which why how list name recommend",
}
_CATEGORY_OF_VERB = {verb: name for name, listed in _VERBS.items() for verb in listed.split()}
_LEAD = re.compile(
    r"^\W*(?:(?:please|kindly|also|then|now|you (?:need|have|are asked) to|i (?:want|need|would like) you to|(?:can|"
    r"could|would|will) you|try|help me(?: to)?|in this task|your task is to|to)\s+)*(?P<verb>[a-z]+)"
)

_CODING = (
    r"```|\b(?:python|javascript|typescript|java|c\+\+|c#|rust|golang|sql|html|css|bash|regex|regular expression|"
    r"leetcode|json|algorithm|pseudo-?code|source code|unit tests?|compiler|stack trace|dataframe)\b|\bdef \w+\(|"
    r"#include|\b(?:write|read|add|debug|refactor|fix|explain)\b[^.\n]{0,40}\b(?:code|program|script|function)\b"
)
_SAFETY = (
    r"\b(?:hate speech|toxic|offensive|(?:counter-?)?stereotypes?|gender[- ]biased?|identify (?:the )?bias\w*|"
    r"unethical|ethical|harmful|self[- ]harm|suicide|bomb|hack (?:into|someone)|illegal\w*|poison|racist|sexist|"
    r"phishing|malware|ssn|social security number|address of this person|inclusive phrasing)\b"
)
_TALK = (
    r"\bchat history\b|\b(?:i am|i'm|i feel|i've been) (?:\w+ ){0,3}(?:sad|lonely|depressed|anxious|upset|bored|"
    r"stressed|worried)\b|\b(?:let's|can we) (?:chat|talk)\b|\b(?:generate|write|give) a (?:response|reply) (?:to|"
    r"given)\b|\bjob interview\b"
)
_TALK_AT_START = (
    r"\W*(?:hi|hello|hey|good (?:morning|evening)|how are you|thanks?|thank you|bye)\b.{0,60}$|"
    r"\W*(?:are|do|can|have|did|would) you (?:\w+ ){0,3}(?:like|feel|love|human|real|smart\w*|favou?rite|dream)\b"
)
_ANALYSIS = (
    r"\b(?:calculat\w*|how many|how much|percent\w*|probability|average|sum of|in total|prove|equations?|math\w*|"
    r"deduc\w*|syllogism|classif\w*|categor\w*|pos tags?|sentiment|summar\w*|tl;?dr|translat\w*|positive or negative|"
    r"paraphrase|same meaning|entail\w*|true or false|yes or no|options?|choices|choose|select|step by step|steps|"
    r"analogy|according to|based on the|given (?:the|a|some|two) (?:passage|paragraph|context|facts|text|sentence|set|"
    r"query|document|dialogue)|context|passage|article|document|review|subsets?|dependenc\w*|grammatical|"
    r"misspelling)\b|\d\s*[-+*/=]\s*\d"
)
_FACTS_AT_START = r"\W*(?:what|who|when|where|which|why|how|whose|whom|is|are|was|were|does|do|did)\b"
_FACTS = (
    r"\b(?:who is|who was|explain|define|definition|tell me (?:about|why|how)|capital of|history of|meaning of|"
    r"difference between|fact|factual\w*|laws?|examples? of|example of|synonyms?|information|medicine|answer the "
    r"following question|in which year|in what year|recipe|address|details?)\b|\?\s*$"
)
_CREATION = (
    r"\b(?:poem|haiku|sonnet|lyrics|stor(?:y|ies)|fiction\w*|screenplay|scene|joke|pun|riddle|slogan|metaphor|"
    r"limerick|speech|cover letter|blog post|creative\w*|imagin\w*|role-?play|brainstorm|invent|make up|come up with|"
    r"movie plot|proverb|e-?mail|phrase|ideas|suggestions|list of)\b"
)


# every match of the rule holds one of these: most texts hold none, and looking for them takes a fifth of the time
_CODING_NEEDS = (
    "```|python|script|java|c++|c#|rust|golang|sql|html|css|bash|regex|regular expression|code|json|algorithm|"
    "unit test|compiler|stack trace|dataframe|def |#include|program|function"
)
_SAFETY_NEEDS = (
    "hate speech|toxic|offensive|stereotype|bias|ethical|harm|suicide|bomb|hack|illegal|poison|racist|sexist|phishing|"
    "malware|ssn|social security number|address of this person|inclusive"
)
_TALK_NEEDS = "chat|talk|sad|lonely|depressed|anxious|upset|bored|stressed|worried| a response| a reply|job interview"


class _Rule:
    """What a category's prompts begin with, or have anywhere in them; searched for as one pattern they take longer.

    For texts in lower case: to ignore case takes twice the time. `needs`: texts of which every match of `anywhere`
    holds one.
    """

    def __init__(self, anywhere: str, at_start: str = r"(?!)", needs: str = ""):
        self._anywhere, self._at_start = re.compile(anywhere), re.compile(at_start)
        self._needs = needs.split("|")  # of none at all: "", which every text holds

    def finds(self, text: str) -> bool:
        if self._at_start.match(text):
            return True
        return any(map(text.__contains__, self._needs)) and self._anywhere.search(text) is not None


_FIRST = {
    "coding": _Rule(_CODING, needs=_CODING_NEEDS),
    "safety": _Rule(_SAFETY, needs=_SAFETY_NEEDS),
    "conversation": _Rule(_TALK, _TALK_AT_START, _TALK_NEEDS),
}
_LATER = {"analytical": _Rule(_ANALYSIS), "factual": _Rule(_FACTS, _FACTS_AT_START), "creative": _Rule(_CREATION)}
_NOT_CREATIVE = re.compile(r"\b(?:summar\w*|answer|math|steps|word for)\b")
_BETWEEN_CLAUSES = re.compile(r"[.,;:?!\n]+")
ENDS = 300  # characters at both ends of a prompt, where instructions stand


class Category(NamedTuple):
    """A category and how it was decided: label, source, rule or unknown."""

    name: str
    by: str


def from_label(label: object) -> str:
    """Our category for a label of ours or of another taxonomy; "" for a label that is not known."""
    key = re.sub(r"[\s_]+", " ", str(label).strip().lower())
    return _OF_LABEL.get(key) or _OF_LABEL.get(key.replace("-", " ")) or ""


def from_prompt(prompt: str) -> str:
    """The category that the rules give an instruction, or "unknown". The first rule that matches decides."""
    text = prompt.strip().lower()
    ends = text if len(text) <= 2 * ENDS else f"{text[:ENDS]}\n{text[-ENDS:]}"
    return _by_rules(_FIRST, ends) or _by_verb(text) or _by_rules(_LATER, ends) or "unknown"


def _by_rules(rules: Mapping[str, _Rule], text: str) -> str:
    return next((name for name, rule in rules.items() if rule.finds(text)), "")


def _by_verb(text: str) -> str:
    """The category of the first clause that begins with a verb of the table, in the first ENDS characters."""
    for clause in _BETWEEN_CLAUSES.split(text[:ENDS]):
        lead = _LEAD.match(clause)
        name = _CATEGORY_OF_VERB.get(lead["verb"]) if lead else None
        if name == "creative" and _NOT_CREATIVE.search(clause):
            return "analytical"
        if name == "factual" and _LATER["analytical"].finds(text[:ENDS] + text[-ENDS:]):
            return "analytical"
        if name:
            return name
    return ""


def categorise(
    conversations: Sequence[Conversation], field: str = "category", source_defaults: Mapping[str, str] | None = None
) -> list[Category]:
    """The category of every row. `field` is the metadata field of an explicit label; `source_defaults` maps sources.

    Raises InputError for a default that is no category.
    """
    defaults = dict(source_defaults or {})
    for source, name in defaults.items():
        if name not in CATEGORIES:
            known = ", ".join(CATEGORIES)
            raise InputError(f"categories: source {source!r} has default {name!r}; expected one of {known}")
    out = []
    for row in conversations:
        labelled = from_label(row.metadata[field]) if row.metadata.get(field) else ""
        if labelled:
            out.append(Category(labelled, "label"))
        elif row.address.source in defaults:
            out.append(Category(defaults[row.address.source], "source"))
        else:
            asked = next((message.content for message in reversed(row.messages) if message.role == "user"), "")
            name = from_prompt(asked)
            out.append(Category(name, "unknown" if name == "unknown" else "rule"))
    return out


def table(categories: Sequence[Category], conversations: Sequence[Conversation]) -> dict[str, dict[str, int]]:
    """Rows by source and category."""
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for category, row in zip(categories, conversations, strict=True):
        counts[row.address.source][category.name] += 1
    return {source: dict(sorted(found.items())) for source, found in sorted(counts.items())}


def answered_words(conversation: Conversation) -> int:
    """Words of the assistant's messages: a stand-in for supervised tokens where nothing is tokenised yet."""
    return sum(len(words.words(turn.response)) for turn in words.turns(conversation))
