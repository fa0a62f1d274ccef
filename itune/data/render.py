"""Conversation -> Example: token ids as transformers gives them, weights proven by decoding.

The rendered text is encoded as one string, so that ids equal `apply_chat_template`'s. Then every added token among them must
stand where the template wrote one; if a message's text made another, the conversation is encoded again piece by piece, the
template's added tokens by id and all other text without added tokens.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from itune.data.formats import messages_of
from itune.data.masks import PLACEHOLDER, Rendering, located, region_of
from itune.data.templates import TemplateRefusal, Tokenizer, require_template, with_template
from itune.types import Conversation, Example, InputError, Message


class AddedToken(NamedTuple):
    """An added token that the template writes: `position` in the structure, after `spans_before` placeholders."""

    id: int
    position: int
    length: int
    spans_before: int


@dataclasses.dataclass
class Structure:
    """What a template writes around texts: its added tokens, and for each span the one that ends its turn (-1: none)."""

    added: list[AddedToken]
    end_of_span: list[int]
    markers: tuple[str, ...]


@dataclasses.dataclass
class Outcome:
    """What became of one conversation: an example, or the error that refuses it; `notes` count what was remarkable."""

    example: Example | None = None
    error: InputError | None = None
    notes: tuple[str, ...] = ()


class _Encoded(NamedTuple):
    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


class _Piece(NamedTuple):
    """One weighted run of tokens [first, last) with the text that it must decode to."""

    first: int
    last: int
    weight: float
    text: str


def render(conversation: Any, tokenizer: Any, max_length: int | None = None, train_on: str = "assistant") -> Example:
    """The example of a Conversation, or of a list of {"role", "content"}.

    tokenizer: a Tokenizer, or a transformers fast tokenizer with a chat template. max_length: tokens kept from the start.
    train_on: "assistant" weights every assistant turn, "last" the last one, "all" every message. A message's own weight
    replaces its role's. Raises InputError for what cannot be rendered or proven, and where no target is left.
    """
    conversation, tokenizer = as_conversation(conversation), as_tokenizer(tokenizer)
    outcome = render_many([conversation], tokenizer, train_on)[0]
    if outcome.error is not None:
        raise outcome.error
    assert outcome.example is not None
    example = outcome.example
    if max_length is not None and len(example.token_ids) > max_length:
        example = truncated(example, max_length)
        if example is None:
            raise InputError(f"{conversation.address}: no target is left within {max_length} tokens; expected a longer "
                             "data.max_length or a shorter prompt")
    return example


def render_prompt(conversation: Any, tokenizer: Any) -> np.ndarray:
    """int32 ids up to and including the generation prompt; a final assistant turn is dropped."""
    conversation, tokenizer = as_conversation(conversation), as_tokenizer(tokenizer)
    messages = conversation.messages
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    prompt = dataclasses.replace(conversation, messages=messages)
    if not messages:
        raise InputError(f"{conversation.address}: no message stands before the assistant's; expected a prompt")
    try:
        rendering = located(prompt, require_template(tokenizer), add_generation_prompt=True)
        structure = _structure(rendering, tokenizer)
        encoding = tokenizer.backend.encode(rendering.text, add_special_tokens=False)
        return _encoded(rendering, structure, encoding, tokenizer)[0].ids
    except TemplateRefusal as error:
        raise _refused(prompt, tokenizer, error) from error


def truncated(example: Example, max_length: int) -> Example | None:
    """The first `max_length` tokens, or None where they hold no target (the first token is never one)."""
    if not example.loss_weights[1:max_length].any():
        return None
    return dataclasses.replace(example, token_ids=example.token_ids[:max_length], loss_weights=example.loss_weights[:max_length])


def render_many(conversations: Sequence[Conversation], tokenizer: Tokenizer, train_on: str = "assistant") -> list[Outcome]:
    """Outcomes in the order of `conversations`. Encodes them as one batch, in as many threads as tokenizers takes."""
    template = require_template(tokenizer)
    outcomes = [Outcome() for _ in conversations]
    renderings: list[Rendering | None] = []
    for conversation, outcome in zip(conversations, outcomes):
        try:
            renderings.append(located(conversation, template))
        except TemplateRefusal as error:
            outcome.error = _refused(conversation, tokenizer, error)
            renderings.append(None)
    texts = [rendering.text for rendering in renderings if rendering is not None]
    encodings = iter(tokenizer.backend.encode_batch(texts, add_special_tokens=False))
    pieces: list[list[_Piece]] = []
    for conversation, outcome, rendering in zip(conversations, outcomes, renderings):
        pieces.append([])
        if rendering is None:
            continue
        try:
            outcome.example, pieces[-1], outcome.notes = _example(conversation, rendering, next(encodings), tokenizer, train_on)
        except TemplateRefusal as error:
            outcome.error = _refused(conversation, tokenizer, error)
    _prove(conversations, outcomes, pieces, tokenizer)
    return outcomes


def _example(conversation: Conversation, rendering: Rendering, encoding: Any, tokenizer: Tokenizer,
             train_on: str) -> tuple[Example, list[_Piece], tuple[str, ...]]:  # fmt: skip
    structure = _structure(rendering, tokenizer)
    encoded, apart = _encoded(rendering, structure, encoding, tokenizer)
    weights = np.zeros(len(encoded.ids), np.float32)
    pieces = []
    for index, weight in _weights(conversation, train_on):
        piece = _piece(conversation, index, weight, rendering, structure, encoded, tokenizer)
        if piece is not None:
            weights[piece.first : piece.last] = piece.weight
            pieces.append(piece)
    if not weights[1:].any():
        raise TemplateRefusal(f"no token carries weight (data.train_on={train_on}, and the weights of its messages)")
    notes = ["text of an added token kept as text"] if apart else []
    if structure.markers and any(marker in message.content for message in conversation.messages for marker in structure.markers):
        notes.append("text holds a marker that the template writes as ordinary text")
    return Example(encoded.ids, weights, conversation.address, conversation.metadata), pieces, tuple(notes)


def _weights(conversation: Conversation, train_on: str) -> list[tuple[int, float]]:
    """(message, weight) of those that carry any."""
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    found = []
    for index, message in enumerate(messages):
        default = float(train_on == "all" or (message.role == "assistant" and (train_on != "last" or index == last)))
        weight = default if message.weight is None or (train_on == "last" and index != last) else message.weight
        if weight:
            found.append((index, weight))
    return found


def _piece(conversation: Conversation, index: int, weight: float, rendering: Rendering, structure: Structure,
           encoded: _Encoded, tokenizer: Tokenizer) -> _Piece | None:  # fmt: skip
    message = conversation.messages[index]
    beside_content = any(message.extra.get(name) for name in ("tool_calls", "reasoning_content", "reasoning", "thinking"))
    if message.role == "assistant" and beside_content:
        start, end_token = _generated(conversation, index, rendering, structure, tokenizer)
        end = -1
    else:
        if not message.content.strip():
            if message.role == "assistant":
                raise TemplateRefusal(f"message {index} is an empty assistant turn; expected text to learn")
            return None
        start, end, span = region_of(rendering, index, message.content)
        end_token = structure.end_of_span[span]
        if end_token < 0 and message.role == "assistant":
            following = rendering.text[end : end + 20]
            raise TemplateRefusal(f"it writes no added token after an assistant's content (found {following!r}), so a model "
                                  f"would not learn to stop; expected an end-of-turn token of this tokenizer")
    if end_token >= 0:
        end = _position(structure.added[end_token], rendering) + structure.added[end_token].length
    first = int(np.searchsorted(encoded.ends, start, side="right"))
    last = int(np.searchsorted(encoded.starts, end, side="left"))
    if last <= first:
        raise TemplateRefusal(f"message {index} has no token of its own")
    text = rendering.text[int(encoded.starts[first]) : int(encoded.ends[last - 1])]
    return _Piece(first, last, weight, text)


def _generated(conversation: Conversation, index: int, rendering: Rendering, structure: Structure,
               tokenizer: Tokenizer) -> tuple[int, int]:  # fmt: skip
    """(start, end-of-turn token) of a turn with tool calls or reasoning: all that follows its generation prompt."""
    before = dataclasses.replace(conversation, messages=conversation.messages[:index])
    prompt = require_template(tokenizer).render(
        [{"role": m.role, "content": m.content, **m.extra} for m in before.messages], conversation.metadata.get("tools"), True)
    if not rendering.text.startswith(prompt):
        raise TemplateRefusal(f"message {index} has tool calls or reasoning, and the text before it differs from its "
                              "generation prompt, so its start is not provable")
    for number, token in enumerate(structure.added):
        if token.id == tokenizer.end_of_turn_id and _position(token, rendering) >= len(prompt):
            return len(prompt), number
    raise TemplateRefusal(f"message {index} has no end-of-turn token")


def _position(token: AddedToken, rendering: Rendering) -> int:
    spans = rendering.spans[: token.spans_before]
    return token.position + sum(span.end - span.start for span in spans) - len(spans)


def _structure(rendering: Rendering, tokenizer: Tokenizer) -> Structure:
    """The structure of a rendering; conversations of the same roles share one, so it is kept."""
    kept = tokenizer.__dict__.setdefault("_structures", {})
    if rendering.structure not in kept:
        if len(kept) > 10_000:
            kept.clear()
        kept[rendering.structure] = _read_structure(rendering.structure, tokenizer)
    return kept[rendering.structure]


def _read_structure(text: str, tokenizer: Tokenizer) -> Structure:
    import re

    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    added = []
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets):
        flags = tokenizer.added_flags.get(token_id)
        if flags is None or PLACEHOLDER in text[start:end]:
            continue  # a placeholder that becomes the unknown token is not the template's
        inside = text.find(flags.content, start, end)
        position, length = (inside, len(flags.content)) if inside >= 0 else (start, end - start)
        added.append(AddedToken(token_id, position, length, text.count(PLACEHOLDER, 0, position)))
    positions = [token.position for token in added]
    end_of_span = []
    for place in (i for i, sign in enumerate(text) if sign == PLACEHOLDER):
        following = bisect.bisect(positions, place)
        near = following < len(added) and not text[place + 1 : positions[following]].strip()
        end_of_span.append(following if near else -1)
    ordinary = list(text)
    for token in added:
        ordinary[token.position : token.position + token.length] = [" "] * token.length
    markers = re.findall(r"\[/?[A-Z_]{2,}\]|<{1,2}/?[A-Z_]+>{1,2}|<\|\w+\|>|###? \w+:", "".join(ordinary))
    return Structure(added, end_of_span, tuple(dict.fromkeys(markers)))


def _encoded(rendering: Rendering, structure: Structure, encoding: Any, tokenizer: Tokenizer) -> tuple[_Encoded, bool]:
    """Ids and character offsets, and whether the texts had to be encoded apart from the template's added tokens."""
    ids = np.asarray(encoding.ids, np.int32)
    expected = structure.added
    at = np.flatnonzero(tokenizer.is_added_V[ids])
    joint = len(at) == len(expected)
    for place, token in zip(at.tolist(), expected) if joint else ():
        start, end = encoding.token_to_chars(place)
        position = _position(token, rendering)
        joint = joint and ids[place] == token.id and start <= position and end >= position + token.length
    if joint:
        offsets = np.asarray(encoding.offsets, np.int32).reshape(-1, 2)
        return _Encoded(ids, offsets[:, 0], offsets[:, 1]), False
    return _encode_apart(rendering, structure, tokenizer), True


def _encode_apart(rendering: Rendering, structure: Structure, tokenizer: Tokenizer) -> _Encoded:
    """The template's added tokens by id, everything between them without added tokens."""
    text, cursor = rendering.text, 0
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []

    def ordinary(start: int, end: int) -> None:
        part = tokenizer.plain_backend.encode(text[start:end], add_special_tokens=False)
        made = [i for i in part.ids if tokenizer.is_added_V[i] and i != tokenizer.hf.unk_token_id]
        if made:
            name = tokenizer.added_flags[made[0]].content
            raise TemplateRefusal(f"the tokenizer makes the added token {name!r} of ordinary text; expected message text without it")
        ids.extend(part.ids)
        offsets.extend((a + start, b + start) for a, b in part.offsets)

    for token in structure.added:
        start = _position(token, rendering)
        end, flags = start + token.length, tokenizer.added_flags[token.id]
        before = len(text[cursor:start].rstrip()) + cursor if flags.lstrip else start
        if cursor < before:
            ordinary(cursor, before)
        cursor = end + len(text[end:]) - len(text[end:].lstrip()) if flags.rstrip else end
        ids.append(token.id)
        offsets.append((before, cursor))
    if cursor < len(text):
        ordinary(cursor, len(text))
    spans = np.asarray(offsets, np.int32).reshape(-1, 2)
    return _Encoded(np.asarray(ids, np.int32), spans[:, 0], spans[:, 1])


def _prove(conversations: Sequence[Conversation], outcomes: list[Outcome], pieces: list[list[_Piece]],
           tokenizer: Tokenizer) -> None:  # fmt: skip
    """Decode every weighted run and compare it with the text that it stands for; what differs is refused."""
    runs = [(row, piece) for row, found in enumerate(pieces) for piece in found]
    ids_of = [outcomes[row].example.token_ids[piece.first : piece.last].tolist() for row, piece in runs]  # type: ignore[union-attr]
    for (row, piece), decoded in zip(runs, tokenizer.backend.decode_batch(ids_of, skip_special_tokens=False)):
        if decoded == piece.text or decoded.strip() == piece.text.strip():
            continue
        again = tokenizer.backend.encode(piece.text, add_special_tokens=False).ids
        # Word-level and lower-casing tokenizers lose something of every text; they must lose it of this one too.
        if "".join(tokenizer.decode(again).split()) == "".join(decoded.split()):
            continue
        refusal = TemplateRefusal(f"the weighted tokens decode to {decoded[:60]!r}; expected {piece.text[:60]!r}")
        outcomes[row] = Outcome(error=_refused(conversations[row], tokenizer, refusal))


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The added token that the template writes after an assistant's content, found by rendering one exchange."""
    probe = Conversation((Message("user", "Where to?"), Message("assistant", "Home.")))
    try:
        rendering = located(probe, require_template(tokenizer))
        structure = _structure(rendering, tokenizer)
        number = structure.end_of_span[region_of(rendering, 1, "Home.")[2]]
    except TemplateRefusal:
        return None
    return structure.added[number].id if number >= 0 else None


def as_conversation(given: Any) -> Conversation:
    """A Conversation, also from a list of {"role", "content"} or of Message."""
    if isinstance(given, Conversation):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(item, Message) for item in given):
        return Conversation(tuple(given))
    if isinstance(given, list | tuple) and all(isinstance(item, Mapping) for item in given):
        return Conversation(tuple(messages_of(list(given), "conversation")))
    raise InputError(f"found {type(given).__name__}; expected a Conversation or a list of messages with role and content")


def as_tokenizer(given: Any) -> Tokenizer:
    """A Tokenizer; one made of a transformers tokenizer is kept with it until its template changes."""
    if isinstance(given, Tokenizer):
        return given
    kept = given.__dict__.get("_itune_tokenizer")
    if kept is None or kept.vocab_size != len(given) or (kept.template and kept.template.source) != (given.chat_template or None):
        kept = given.__dict__["_itune_tokenizer"] = with_template(given)
    return kept


def _refused(conversation: Conversation, tokenizer: Tokenizer, error: TemplateRefusal) -> InputError:
    name = tokenizer.template.name if tokenizer.template else ""
    return InputError(f"{conversation.address}: chat template ({name}): {error}")
