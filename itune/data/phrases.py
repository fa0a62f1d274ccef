"""Phrases by which broken pairs are told: blanks of a template, refusals, pointers at a text, orders to edit."""

from __future__ import annotations

import re

_FLAGS = re.IGNORECASE | re.DOTALL

# the whole answer is a template's blank: "TODO", "[insert answer here]", "???"
_BLANK = r"[\s<>\[\](){}_.\-*#\"'`:!]*"
_NOTHING = (
    r"to-?do\b.{0,60}|tbd|tba|fixme|n\s?/\s?a|nan|null|none|nil|undefined|xxx+|place\s?holder|lorem ipsum\b.*|empty|"
    r"\?+|_+|no ?(?:input|output|answer|response)|(?:to be|please) (?:filled|fill|completed|added|determined)(?: in)?"
)
_SLOT = (
    r"(?:(?:insert|enter|write|type|add|put|your|the|model|assistant|this is)\s+){0,3}"
    r"(?:answer|response|output|text|reply|completion|content|solution|input)s?"
    r"(?:\s+(?:here|goes here|pending|missing|not available|unavailable|tbd))?"
)
PLACEHOLDER = re.compile(rf"^{_BLANK}(?:{_NOTHING}|{_SLOT})*{_BLANK}$", _FLAGS)

_CANNOT = (
    r"(?:can\s?not|can't|cant|could(?: not|n't)|am unable|'m unable|unable|(?:am |'m |is )?not able|won't|will not|"
    r"would rather not)"
)
_DOING = (
    r"(?:help|assist|answer|provide|fulfil\w*|comply|do (?:that|this|so|it)|share|give|complete|generate|create|"
    r"discuss|support|engage|respond|process|browse|access|offer|write|produce|participate|reply|continue|recommend|say|"
    r"tell|make|be able)"
)
REFUSAL = re.compile(
    rf"\bi\s*(?:am sorry,? (?:but )?i )?{_CANNOT}(?: to)?(?: \w+)? {_DOING}\b"
    r"|\bas an? (?:\w+ )?(?:ai|artificial|language model|chatbot|virtual)\b"
    r"|\b(?:against|violates?) (?:my|our|the) (?:guidelines|polic\w+|programming|principles|ethic\w*|terms)"
    r"|\bi (?:do not|don't) (?:have|possess) (?:access|the (?:ability|capability)|personal|feelings|opinions|enough "
    r"information)|\b(?:must|have to|need to|going to|will) (?:respectfully |politely )?(?:decline|refuse)"
    r"|\bi (?:decline|refuse) to\b|\bnot (?:designed|programmed|permitted|allowed|comfortable|appropriate for me)\b"
    rf"|\b(?:sorry|apolog\w+|afraid|regret|unfortunately)\b.{{0,60}}\b(?:{_CANNOT}|decline|against|privacy concerns?)",
    _FLAGS,
)
NO_REFUSAL = re.compile(r"can(?:no|')?t help (?:but|\w+ing)\b", re.IGNORECASE)

# a text that the prompt must contain when it points at it
INPUTS = (
    r"(?:text|passage|article|sentences?|paragraphs?|documents?|e-?mails?|code|functions?|program|script|snippet|lists?|"
    r"tables?|reviews?|story|poem|conversation|dialogue?|chat|questions?|problems?|essays?|images?|pictures?|words?|data|"
    r"statements?|tweets?|posts?|messages?|inputs?|context|equations?|numbers?|names|people|paper|abstract|facts?|claims?|"
    r"quer(?:y|ies)|letter|phrases?|expressions?|lines?|lyrics|transcript|report|headline|comment|description|options|"
    r"information|choices|example|items|ingredients|countries|universities|cities|definition|outline|ones?|recipe|speech|"
    r"song|quote|web ?page)"
)
_GIVEN = r"(?:following|below|provided|given|attached|enclosed)"
POINTS = re.compile(
    rf"\b(?:the |this |these |each |any |a |an |all )?(?:of the )?{_GIVEN}\b(?: \w+){{0,3}}? {INPUTS}\b"
    rf"|\b(?:this|these) (?:\w+ )?{INPUTS}\b|\b(?:above|preceding) (?:\w+ )?{INPUTS}\b|\b(?:following|below)\W*$"
    rf"|\b{INPUTS} (?:\w+ )?(?:below|above|provided|given|attached|that follows)\b",
    re.IGNORECASE,
)
WORKS_ON = re.compile(
    r"^\W*(?:please |can you |could you )?(?:summari[sz]e|translate|classify|correct|edit|rewrite|paraphrase|rephrase|"
    r"proofread|identify|extract|find|sort|explain|analy[sz]e|convert|categori[sz]e|improve|fix|shorten|"
    r"simplify|complete|continue|detect|count|replace|rank|highlight|underline|parse|label|punctuate)\b"
    rf"[^.?!]*\b(?:the|this|these|that|my) (?:\w+ )?{INPUTS}\b",
    re.IGNORECASE,
)
INSTRUCTS = re.compile(
    r"(?:please|then|also|output|return|answer|respond|reply|explain|keep|do not|don't|make|use|be|give|write|show|"
    r"list|provide|include|if|select|choose|classify|summari[sz]e|thank|translate)\b",
    re.IGNORECASE,
)

_EDITED = (
    r"correct\w*|rewrite|edit|fix|proofread|punctuat\w*|capitali[sz]e|grammar\w*|grammatical|repeat|copy|paraphrase|"
    r"rephrase|translate|extract|quote|replace|(?:generate|write|create|ask|make|what is|which) \w+ (?:\w+ )?question"
)
EDITS = re.compile(rf"\b(?:{_EDITED})\b", re.IGNORECASE)
COPIES = re.compile(
    rf"\b(?:{_EDITED}|select|find|identify|format|convert|choose|which of|complete|fill|sort|reverse|highlight|print|"
    r"echo|same|exact\w*|verbatim|sentence|comment|code|function)\b",
    re.IGNORECASE,
)
