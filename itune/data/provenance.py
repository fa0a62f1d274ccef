"""Which characters of a rendered conversation come from which message, proven by rendering it twice.

Once as it is, once with every message text between marker characters (Unicode noncharacters, which real text does not
hold). If the second rendering without its markers equals the first, the markers show where each text went; the rest is
the template's. Templates that trim texts, or take reasoning apart, are met by markers further inside. Where nothing
fits, the conversation is refused: a mask is never guessed.

Conversations of the same roles mostly share one frame, the template's own text around theirs. A frame found once is
tried first: if the frame with the new texts in it equals the plain rendering, that is the same proof for half the work.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from itune.data.templates import ChatTemplate, TemplateRefusal
from itune.types import Conversation, Message

PLACEHOLDER = "\ufdd0"
ALPHABETS = (0xFDD0, 0xFDDC, 0x10F000, 0xF0000)  # twelve characters each: open, close, ten digits
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
_ID = re.compile(r"[\w.:-]+")
THINK = re.compile(r"(</?think(?:ing)?>)")


class Span(NamedTuple):
    """Characters [start, end) of the rendered text are `field` of message `owner`; owner -1 is the tools.

    again: the template has written this very text before; a tool's message may repeat the name of the call.
    """

    owner: int
    field: str
    start: int
    end: int
    again: bool = False


class Rendering(NamedTuple):
    """`structure` is the template's own text, one PLACEHOLDER for each span."""

    text: str
    structure: str
    spans: tuple[Span, ...]


class Frame(NamedTuple):
    """The template's text around message contents: parts[0], content of owners[0], parts[1], ..."""

    structure: str
    parts: tuple[str, ...]
    owners: tuple[int, ...]
    trims: bool


Style = Callable[[str], list[tuple[bool, str]]]


def located(conversation: Conversation, template: ChatTemplate, add_generation_prompt: bool = False) -> Rendering:
    """Render a conversation and find its texts. Raises TemplateRefusal where it refuses or nothing can be proven."""
    tools = conversation.metadata.get("tools")
    template = template.for_tools(tools)
    messages = conversation.messages
    dicts = [template_view(message) for message in messages]
    plain = template.render(dicts, tools, add_generation_prompt)
    framed = not tools and not any(message.extra for message in messages)
    if framed and "</think" in template.source:  # it may take tags out of a text and write the same as its own
        framed = not any(THINK.search(message.content) for message in messages)
    key = (add_generation_prompt, *((message.role, not message.content) for message in messages))
    frames = template.frames.setdefault(key, []) if framed else []
    for frame in frames:
        found = _fill(frame, messages, plain)
        if found is not None:
            return found
    found, style = _marked_rendering(plain, dicts, tools, template, add_generation_prompt)
    if framed and style is not _reasoning and len(frames) < 8:
        parts = tuple(found.structure.split(PLACEHOLDER))
        frames.append(Frame(found.structure, parts, tuple(span.owner for span in found.spans), style is _inner))
        frames.sort(key=lambda frame: frame.trims)
    return found


def template_view(message: Message) -> dict[str, Any]:
    """What templates see of a message; reasoning under each name that templates read, as transformers has it."""
    fields = {"role": message.role, "content": message.content, **message.extra}
    reasoning = next((fields[name] for name in REASONING_FIELDS if fields.get(name) is not None), None)
    if reasoning is not None:
        fields = {"thinking": reasoning, **fields, "reasoning_content": reasoning}
    return fields


def _fill(frame: Frame, messages: tuple[Message, ...], plain: str) -> Rendering | None:
    """The rendering that a frame makes of the messages' contents, if it is the plain rendering."""
    pieces, spans, length = [frame.parts[0]], [], len(frame.parts[0])
    for owner, part in zip(frame.owners, frame.parts[1:]):
        content = messages[owner].content
        content = content.strip() if frame.trims else content
        spans.append(Span(owner, "content", length, length + len(content)))
        pieces += (content, part)
        length += len(content) + len(part)
    return Rendering(plain, frame.structure, tuple(spans)) if "".join(pieces) == plain else None


def _marked_rendering(plain: str, messages: list[dict[str, Any]], tools: Any, template: ChatTemplate,
                      add_generation_prompt: bool) -> tuple[Rendering, Style]:  # fmt: skip
    base = next((base for base in ALPHABETS if not _alphabet(base).search(plain)), None)
    if base is None:
        raise TemplateRefusal("the text holds every marker character that could show where it goes")
    styles = [_outer, _inner, *([_reasoning] if "</think" in template.source else [])]
    ids = any(message.get(name) for message in messages for name in ("tool_calls", "tool_call_id"))
    for style, bare in [*((style, False) for style in styles), *((style, True) for style in styles if ids)]:
        marks = _Marks(base, style, bare)
        marked_messages = [marks.message(index, message) for index, message in enumerate(messages)]
        marked_tools = marks.value(tools, -1, "tools", _outer) if tools else tools
        try:
            found = marks.read(template.render(marked_messages, marked_tools, add_generation_prompt))
        except TemplateRefusal:  # the template looks into texts; the next style may leave it what it looks for
            continue
        if found is not None and found.text == plain:
            return found, style
    raise TemplateRefusal("it changes message texts in a way that leaves no proof of where they go")


class _Marks:
    """Puts markers around texts, and reads them back from what was rendered."""

    def __init__(self, base: int, style: Style, bare_ids: bool = False):
        self.base, self.style = base, style
        # a template may measure the id of a call
        self.bare = ("type", "id", "tool_call_id") if bare_ids else ("type",)
        self.owners: list[tuple[int, str]] = []

    def message(self, index: int, message: dict[str, Any]) -> dict[str, Any]:
        style = _inner if self.style is _reasoning and message["role"] != "assistant" else self.style
        marked = {k: v if k == "role" or self._is_bare(k, v) else self.value(v, index, k, style)
                  for k, v in message.items() if k != "tool_calls"}
        if calls := message.get("tool_calls"):
            marked["tool_calls"] = [self.value(call, index, f"tool_calls[{number}]", style)
                                    for number, call in enumerate(calls)]
        return marked

    def value(self, value: Any, owner: int, field: str, style: Style) -> Any:
        """`value` with markers around every text in it, dictionary keys excepted."""
        if isinstance(value, str):
            return self._text(value, owner, field, style)
        if isinstance(value, list | tuple):
            return [self.value(item, owner, field, style) for item in value]
        if isinstance(value, dict):
            # "type": "function" and the like are read by templates, and are nobody's text.
            return {k: v if self._is_bare(k, v) else self.value(v, owner, field, style) for k, v in value.items()}
        return value

    def _is_bare(self, name: str, value: Any) -> bool:
        return name in self.bare and (name == "type" or (isinstance(value, str) and _ID.fullmatch(value) is not None))

    def _text(self, text: str, owner: int, field: str, style: Style) -> str:
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
        text, structure, spans, seen = [], [], [], set()
        length = cursor = 0
        for match in _marked(self.base).finditer(marked):
            between = marked[cursor : match.start()]
            number = int("".join(str(ord(sign) - self.base - 2) for sign in match[1]))
            start = length + len(between)
            length = start + len(match[2])
            text += [between, match[2]]
            structure += [between, PLACEHOLDER]
            spans.append(Span(*self.owners[number], start, length, number in seen))
            seen.add(number)
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
