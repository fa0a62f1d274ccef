"""Which tokens carry weight: an assistant's content and its end of turn, proven by decoding them.

A token that overlaps the content counts as content. The end of turn is the template's text after the content up to its
first added token, with nothing but white space before that token; a model has to write all of it to stop.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from itune.data.encode import Structure, structure_of
from itune.data.offsets import Encoded
from itune.data.provenance import REASONING_FIELDS, THINK, Rendering, Span, template_view
from itune.data.templates import TemplateRefusal, Tokenizer, require_template
from itune.types import Conversation


class Piece(NamedTuple):
    """One weighted run of tokens [first, last), the text that it must decode to, and the added tokens in that text.

    added: (id, start, end) of each, in characters of `text`.
    """

    first: int
    last: int
    weight: float
    text: str
    added: tuple[tuple[int, int, int], ...] = ()


def weighted_pieces(conversation: Conversation, rendering: Rendering, encoded: Encoded, tokenizer: Tokenizer,
                    train_on: str) -> list[Piece]:  # fmt: skip
    """The runs of tokens that carry weight, in order. Raises TemplateRefusal where a turn's place cannot be proven."""
    structure = structure_of(rendering, tokenizer)
    found = []
    for index, weight in _weights(conversation, train_on):
        bounds = _bounds(conversation, index, rendering, structure, encoded, tokenizer)
        if bounds is None:
            continue
        first, last = encoded.tokens_of(*bounds)
        if last <= first:
            raise TemplateRefusal(f"message {index} has no token of its own")
        start, end = encoded.characters_of(first, last)
        _check_edges(rendering.text, bounds, encoded, first, last)
        placed = zip(structure.ids.tolist(), encoded.added)
        added = tuple((token_id, a - start, b - start) for token_id, (a, b) in placed if start <= a and b <= end)
        found.append(Piece(first, last, weight, rendering.text[start:end], added))
    return found


def _check_edges(text: str, bounds: tuple[int, int], encoded: Encoded, first: int, last: int) -> None:
    """Raise TemplateRefusal unless the tokens cover the bounds and only the outer two reach beyond them."""
    start, end = bounds
    first_start, first_end = encoded.characters_of(first, first + 1)
    last_start, last_end = encoded.characters_of(last - 1, last)
    starts_well = first_start <= start < first_end or (start < first_start and text[start:first_start].isspace())
    ends_well = last_start < end <= last_end or (last_end < end and text[last_end:end].isspace())
    if not (starts_well and ends_well):
        raise TemplateRefusal(f"tokens {first} to {last - 1} stand for {text[first_start:last_end]!r}; "
                              f"expected {text[start:end]!r}")


def weights_of(pieces: Sequence[Piece], length: int) -> np.ndarray:
    """float32 [length]: the weights of the pieces, 0 elsewhere."""
    weights = np.zeros(length, np.float32)
    for piece in pieces:
        weights[piece.first : piece.last] = piece.weight
    return weights


def unproven(ids: Sequence[np.ndarray], pieces: Sequence[Sequence[Piece]], tokenizer: Tokenizer) -> dict[int, str]:
    """Decode every piece and compare it with its text: row -> what differs. Empty when all is proven."""
    runs = [(row, piece) for row, found in enumerate(pieces) for piece in found]
    tokens = [ids[row][piece.first : piece.last].tolist() for row, piece in runs]
    wrong = {}
    for (row, piece), decoded in zip(runs, tokenizer.backend.decode_batch(tokens, skip_special_tokens=False)):
        if decoded == piece.text or " " + decoded == piece.text:  # decoders of sentencepiece kind drop the first space
            continue
        # Word-level and lower-casing tokenizers lose something of every text; of this one they must lose the same.
        if _decoded_again(piece, tokenizer).lstrip(" ") != decoded.lstrip(" "):
            wrong[row] = f"the weighted tokens decode to {decoded[:60]!r}; expected {piece.text[:60]!r}"
    return wrong


def _decoded_again(piece: Piece, tokenizer: Tokenizer) -> str:
    """The piece's text, encoded without added tokens save for its own, and decoded."""
    ids: list[int] = []
    cursor = 0
    for token_id, start, end in piece.added:
        ids += tokenizer.encode_plain(piece.text[cursor:start]) + [token_id]
        cursor = end
    return tokenizer.decode(ids + tokenizer.encode_plain(piece.text[cursor:]))


def _weights(conversation: Conversation, train_on: str) -> list[tuple[int, float]]:
    """(message, weight) of those that carry any; with train_on="last" only the last assistant turn may."""
    messages = conversation.messages
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    found = []
    for index, message in enumerate(messages):
        if train_on == "last" and index != last:
            continue
        default = 1.0 if train_on == "all" or message.role == "assistant" else 0.0
        weight = default if message.weight is None else message.weight
        if weight:
            found.append((index, weight))
    return found


def _bounds(conversation: Conversation, index: int, rendering: Rendering, structure: Structure, encoded: Encoded,
            tokenizer: Tokenizer) -> tuple[int, int] | None:  # fmt: skip
    """Characters [start, end) of one message's content and its end of turn; None for an empty turn of the user."""
    message = conversation.messages[index]
    speaks = message.role == "assistant"
    if speaks and any(message.extra.get(name) for name in ("tool_calls", *REASONING_FIELDS)):
        return _generated(conversation, index, rendering, structure, encoded, tokenizer)
    if not message.content.strip():
        if speaks:
            raise TemplateRefusal(f"message {index} is an empty assistant turn; expected text to learn")
        return None
    start, end, span = content_bounds(rendering, index, message.content)
    if structure.end_of_span[span] >= 0:
        ids = tokenizer.end_of_turn_ids
        whole = speaks and ids and tuple(structure.added_after(span)[: len(ids)]) == ids
        end = encoded.added[structure.end_of_span[span] + (len(ids) - 1 if whole else 0)][1]
    elif speaks:
        raise TemplateRefusal(f"it writes no added token after an assistant's content (found "
                              f"{rendering.text[end : end + 20]!r}), so a model would not learn to stop; expected an "
                              "end-of-turn token of this tokenizer")
    return start, end


def content_bounds(rendering: Rendering, owner: int, content: str) -> tuple[int, int, int]:
    """(start, end, last span) of a message's content. Raises TemplateRefusal unless it stands in the text once."""
    indices = [i for i, span in enumerate(rendering.spans) if span.owner == owner and span.field == "content"]
    if not indices:
        raise TemplateRefusal(f"it leaves out the content of message {owner}")
    start, end = rendering.spans[indices[0]].start, rendering.spans[indices[-1]].end
    if len(indices) > 1:
        if indices[-1] - indices[0] + 1 != len(indices) or not THINK.search(content):
            raise TemplateRefusal(f"it writes the content of message {owner} more than once")
        opening = THINK.match(content.lstrip())
        before = rendering.text[:start].rstrip()
        if opening and before.endswith(opening[1]):
            start = len(before) - len(opening[1])
    return start, end, indices[-1]


def _generated(conversation: Conversation, index: int, rendering: Rendering, structure: Structure, encoded: Encoded,
               tokenizer: Tokenizer) -> tuple[int, int]:  # fmt: skip
    """Bounds of a turn with tool calls or reasoning: all that follows its generation prompt, to its end of turn.

    The end is the end-of-turn token, where it stands before the next message's text. A template may end an earlier
    turn, or a call, in another way: then it is the added token that ends what the conversation so far is rendered as,
    or else the first one after the turn's own text.
    """
    own = [span for span in rendering.spans if span.owner == index]
    for number in range(len(conversation.messages[index].extra.get("tool_calls") or ())):
        if not any(span.field == f"tool_calls[{number}]" for span in own):
            raise TemplateRefusal(f"it leaves out tool call {number} of message {index}")
    if not own:
        raise TemplateRefusal(f"it leaves out the content of message {index}")
    start = _start_of_turn(conversation, index, rendering, tokenizer)
    last, until = _end_of_texts(conversation, index, rendering, own, tokenizer)
    if any(start < span.start < last and span.owner != index for span in rendering.spans):
        raise TemplateRefusal(f"it writes a text of another message inside of message {index}, a result of its calls")
    following = min([until, *(span.start for span in rendering.spans if span.start >= last and span.owner != index)])
    added = [(token_id, *place) for token_id, place in zip(structure.ids.tolist(), encoded.added)
             if last <= place[0] and place[1] <= following]  # fmt: skip
    if not added:
        raise TemplateRefusal(f"message {index} has no end-of-turn token")
    ids = [token_id for token_id, _, _ in added]
    whole = tokenizer.end_of_turn_ids
    if whole and whole[0] in ids:
        place = ids.index(whole[0])
        place += len(whole) - 1 if tuple(ids[place : place + len(whole)]) == whole else 0
    else:
        place = len(added) - 1 if added[-1][2] == until else 0
        while place and added[place - 1][2] == added[place][1]:  # what follows may begin the tool's message
            place -= 1
    return start, added[place][2]


def _end_of_texts(conversation: Conversation, index: int, rendering: Rendering, own: list[Span],
                  tokenizer: Tokenizer) -> tuple[int, int]:  # fmt: skip
    """(where the turn's own texts end, where at the latest the turn does). A tool's message may repeat some of them.

    Mostly the rendering begins with what the conversation up to this turn is rendered as. Else that may do before a
    user's message, as far as all texts of the turn.
    """
    tools, text = conversation.metadata.get("tools"), rendering.text
    template = require_template(tokenizer).for_tools(tools)
    messages = [template_view(message) for message in conversation.messages[: index + 1]]
    until = template.render(messages, tools, False).rstrip()
    if until and text.startswith(until) and (ends := [span.end for span in own if span.end <= len(until)]):
        return max(ends), len(until)
    if not own[-1].again:
        return own[-1].end, len(text)
    try:
        shared = _shared(text, template.render([*messages, {"role": "user", "content": "Why?"}], tools, False))
    except TemplateRefusal:
        shared = 0
    if shared < max(span.end for span in own if not span.again):
        raise TemplateRefusal(f"it writes a text of message {index} more than once, so its end cannot be proven")
    return max(span.end for span in own if span.end <= shared), len(text)


def _shared(one: str, other: str) -> int:
    """Length of the beginning that two texts share."""
    return next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


def _start_of_turn(conversation: Conversation, index: int, rendering: Rendering, tokenizer: Tokenizer) -> int:
    """Where message `index` begins: after its generation prompt, as far as the text has it.

    A generation prompt may open a reasoning that the turn does not have; where the two part, the turn begins. Where an
    earlier reasoning was left out, the texts part before: then the prompt's end must stand once between two messages.
    """
    before = [template_view(message) for message in conversation.messages[:index]]
    tools = conversation.metadata.get("tools")
    template = require_template(tokenizer).for_tools(tools)
    prompt, text = template.render(before, tools, True), rendering.text
    if text.startswith(prompt):
        return len(prompt)
    bare = template.render(before, tools, False)
    same, own = _shared(text, prompt), min(span.start for span in rendering.spans if span.owner == index)
    if prompt.startswith(bare) and not text.startswith(bare):
        since = max((span.end for span in rendering.spans if span.end <= own and span.owner != index), default=0)
        opening, between = prompt[len(bare) :], text[since:own]
        if opening.strip() and between.count(opening) == 1:
            return since + between.index(opening) + len(opening)
    if not (prompt.startswith(bare) and text.startswith(bare) and same > len(bare)):
        raise TemplateRefusal(f"message {index} has tool calls or reasoning, and the text before it differs from its "
                              "generation prompt, so its start cannot be proven")
    return min(same, own)


def with_messages(conversation: Conversation, count: int) -> Conversation:
    """The conversation cut to its first `count` messages."""
    return dataclasses.replace(conversation, messages=conversation.messages[:count])
