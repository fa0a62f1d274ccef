"""Which characters of a rendered conversation come from which message, proven by rendering it twice.

Once as it is, once with every message text between marker characters (Unicode noncharacters, which no real text holds). If
the second rendering without its markers equals the first, the markers show where each text went; the rest is the template's.
Templates that trim texts, or that take reasoning apart, are met by markers further inside. Where nothing fits, the
conversation is refused: a mask is never guessed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from itune.data.templates import ChatTemplate, TemplateRefusal
from itune.types import Conversation

PLACEHOLDER = "\ufdd0"
ALPHABETS = (0xFDD0, 0xFDDC, 0x10F000, 0xF0000)  # twelve characters each: open, close, ten digits
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
THINK = re.compile(r"(</?think(?:ing)?>)")


class Span(NamedTuple):
    """Characters [start, end) of the rendered text are `field` of message `owner`; owner -1 is the tools."""

    owner: int
    field: str
    start: int
    end: int


class Rendering(NamedTuple):
    """`structure` is the template's own text, one PLACEHOLDER for each span."""

    text: str
    structure: str
    spans: tuple[Span, ...]


def located(conversation: Conversation, template: ChatTemplate, add_generation_prompt: bool = False) -> Rendering:
    """Render a conversation and find its texts. Raises TemplateRefusal where the template refuses or nothing is provable."""
    messages = [_as_dict(message) for message in conversation.messages]
    tools = conversation.metadata.get("tools")
    plain = template.render(messages, tools, add_generation_prompt)
    base = next((base for base in ALPHABETS if not _alphabet(base).search(plain)), None)
    if base is None:
        raise TemplateRefusal("the text holds every marker character that could show where it goes")
    for style in (_outer, _inner, _reasoning):
        if style is _reasoning and "</think" not in template.source:
            continue
        marks = _Marks(base, style)
        try:
            marked = template.render(
                [marks.message(index, message) for index, message in enumerate(messages)],
                marks.value(tools, -1, "tools") if tools else tools,
                add_generation_prompt,
            )
        except TemplateRefusal:  # the template looks into texts; the next style may leave it what it looks for
            continue
        found = marks.read(marked)
        if found is not None and found.text == plain:
            return found
    raise TemplateRefusal("it changes message texts in a way that leaves no proof of where they go")


def _as_dict(message: Any) -> dict[str, Any]:
    """What templates see of a message; reasoning under each name that templates read, as transformers has it."""
    fields = {"role": message.role, "content": message.content, **message.extra}
    reasoning = next((fields[name] for name in REASONING_FIELDS if fields.get(name) is not None), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


class _Marks:
    """Puts markers around texts, and reads them back from what was rendered."""

    def __init__(self, base: int, style: Callable[[str], list[tuple[bool, str]]]):
        self.base, self.style = base, style
        self.owners: list[tuple[int, str]] = []

    def message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        style = self.style if message["role"] == "assistant" or self.style is not _reasoning else _inner
        marked = {"role": message["role"]}
        for key, value in message.items():
            if key != "role":
                marked[key] = self.value(value, index, key, style)
        return marked

    def value(self, value: Any, owner: int, field: str, style: Any = None) -> Any:
        """`value` with markers around every text in it, dictionary keys excepted."""
        if isinstance(value, str):
            return self._text(value, owner, field, style or _outer)
        if isinstance(value, list | tuple):
            return [self.value(item, owner, field, style) for item in value]
        if isinstance(value, dict):
            # "type": "function" and the like are read by templates, and none of it is anyone's text
            return {k: v if k == "type" else self.value(v, owner, field, style) for k, v in value.items()}
        return value

    def _text(self, text: str, owner: int, field: str, style: Any) -> str:
        pieces = []
        for is_text, piece in style(text):
            if is_text and piece:
                number = "".join(chr(self.base + 2 + int(digit)) for digit in str(len(self.owners)))
                self.owners.append((owner, field))
                piece = f"{chr(self.base)}{number}{piece}{chr(self.base + 1)}"
            pieces.append(piece)
        return "".join(pieces)

    def read(self, marked: str) -> Rendering | None:
        """The rendering without markers, or None where the template tore a marked text apart."""
        text, structure, spans = [], [], []
        length = cursor = 0
        for match in _marked(self.base).finditer(marked):
            between = marked[cursor : match.start()]
            number = int("".join(str(ord(sign) - self.base - 2) for sign in match[1]))
            start = length + len(between)
            length = start + len(match[2])
            text += [between, match[2]]
            structure += [between, PLACEHOLDER]
            spans.append(Span(*self.owners[number], start, length))
            cursor = match.end()
        text.append(marked[cursor:])
        structure.append(marked[cursor:])
        whole = "".join(text)
        if _alphabet(self.base).search(whole):
            return None
        return Rendering(whole, "".join(structure), tuple(spans))


@functools.cache
def _alphabet(base: int) -> re.Pattern[str]:
    return re.compile(f"[{chr(base)}-{chr(base + 11)}]")


@functools.cache
def _marked(base: int) -> re.Pattern[str]:
    digits = f"[{chr(base + 2)}-{chr(base + 11)}]"
    return re.compile(f"{chr(base)}({digits}+)(.*?){chr(base + 1)}", re.DOTALL)


def _outer(text: str) -> list[tuple[bool, str]]:
    """The whole text is marked."""
    return [(True, text)]


def _inner(text: str) -> list[tuple[bool, str]]:
    """White space around the text stays outside of the markers, for templates that trim."""
    core = text.strip()
    before = text[: len(text) - len(text.lstrip())]
    return [(False, before), (True, core), (False, text[len(before) + len(core) :])] if core else [(False, text)]


def _reasoning(text: str) -> list[tuple[bool, str]]:
    """The parts between think tags are marked one by one, for templates that take an assistant's reasoning apart."""
    pieces: list[tuple[bool, str]] = []
    for part in THINK.split(text):
        pieces += [(False, part)] if THINK.fullmatch(part) else _inner(part)
    return pieces


def content_of(rendering: Rendering, owner: int) -> list[int]:
    """Indices of the spans that are the content of message `owner`."""
    return [i for i, span in enumerate(rendering.spans) if span.owner == owner and span.field == "content"]


def region_of(rendering: Rendering, owner: int, content: str) -> tuple[int, int, int]:
    """(start, end, last span) of an assistant's content in the text. Raises TemplateRefusal unless it stands there once."""
    indices = content_of(rendering, owner)
    if not indices:
        raise TemplateRefusal(f"it leaves out the content of message {owner}")
    spans: Sequence[Span] = [rendering.spans[i] for i in indices]
    start, end = spans[0].start, spans[-1].end
    if len(spans) > 1:
        if indices != list(range(indices[0], indices[-1] + 1)) or not THINK.search(content):
            raise TemplateRefusal(f"it writes the content of message {owner} more than once")
        opening = THINK.match(content.lstrip())
        before = rendering.text[:start].rstrip()
        if opening and before.endswith(opening[1]):
            start = len(before) - len(opening[1])
    return start, end, indices[-1]
