"""Conversation -> Example: token ids as transformers gives them, weights proven by decoding."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from itune.data.encode import encode_many, structure_of
from itune.data.formats import messages_of
from itune.data.masks import content_bounds, unproven, weighted_pieces, weights_of, with_messages
from itune.data.offsets import Encoded
from itune.data.provenance import located
from itune.data.templates import TemplateRefusal, Tokenizer, require_template, with_template
from itune.types import Conversation, Example, InputError, Message


@dataclasses.dataclass
class Outcome:
    """What became of one conversation: an example, or the error that refuses it; `notes` tell what was remarkable."""

    example: Example | None = None
    error: InputError | None = None
    notes: tuple[str, ...] = ()


def render(conversation: Any, tokenizer: Any, max_length: int | None = None, train_on: str = "assistant") -> Example:
    """The example of a Conversation, or of a list of {"role", "content"}.

    tokenizer: a Tokenizer, or a transformers fast tokenizer with a chat template. max_length: tokens kept from the
    start. train_on: "assistant" weights every assistant turn, "last" the last one, "all" every message; a message's own
    weight replaces its role's. Raises InputError for what cannot be rendered or proven, and where no target is left.
    """
    conversation, tokenizer = as_conversation(conversation), as_tokenizer(tokenizer)
    outcome = render_many([conversation], tokenizer, train_on)[0]
    if outcome.error is not None:
        raise outcome.error
    example = outcome.example
    if max_length is not None and example is not None:
        example = truncated(example, max_length)
    if example is None:
        raise InputError(f"{conversation.address}: no target is left within {max_length} tokens; expected a longer "
                         "data.max_length or a shorter prompt")
    return example


def render_prompt(conversation: Any, tokenizer: Any) -> np.ndarray:
    """int32 ids up to and including the generation prompt; a final assistant turn is dropped."""
    conversation, tokenizer = as_conversation(conversation), as_tokenizer(tokenizer)
    count = len(conversation.messages)
    while count and conversation.messages[count - 1].role == "assistant":
        count -= 1
    if count == 0:
        raise InputError(f"{conversation.address}: no message stands before the assistant's; expected a prompt")
    try:
        rendering = located(with_messages(conversation, count), require_template(tokenizer), add_generation_prompt=True)
        encoded = encode_many([rendering], tokenizer)[0]
        if isinstance(encoded, TemplateRefusal):
            raise encoded
    except TemplateRefusal as error:
        raise _refused(conversation, tokenizer, str(error)) from error
    return encoded.ids


def truncated(example: Example, max_length: int) -> Example | None:
    """The first `max_length` tokens, or None where they hold no target (the first token is never one)."""
    if not example.loss_weights[1:max_length].any():
        return None
    return dataclasses.replace(
        example, token_ids=example.token_ids[:max_length], loss_weights=example.loss_weights[:max_length]
    )


def render_many(conversations: Sequence[Conversation], tokenizer: Tokenizer, train_on: str = "assistant"
                ) -> list[Outcome]:  # fmt: skip
    """Outcomes in the order of `conversations`, encoded in batches, in as many threads as tokenizers takes."""
    template = require_template(tokenizer)
    outcomes = [Outcome() for _ in conversations]
    rendered = []
    for row, conversation in enumerate(conversations):
        try:
            rendered.append((row, located(conversation, template)))
        except TemplateRefusal as error:
            outcomes[row].error = _refused(conversation, tokenizer, str(error))
    rows, ids, pieces = [], [], []
    for (row, rendering), encoded in zip(rendered, encode_many([rendering for _, rendering in rendered], tokenizer)):
        conversation = conversations[row]
        try:
            if isinstance(encoded, TemplateRefusal):
                raise encoded
            found = weighted_pieces(conversation, rendering, encoded, tokenizer, train_on)
            weights = weights_of(found, len(encoded.ids))
            if not weights[1:].any():
                raise TemplateRefusal(f"no token carries weight (data.train_on={train_on}, and its messages' weights)")
        except TemplateRefusal as error:
            outcomes[row].error = _refused(conversation, tokenizer, str(error))
            continue
        example = Example(encoded.ids, weights, conversation.address, conversation.metadata)
        markers = structure_of(rendering, tokenizer).markers
        notes = _notes(conversation, encoded, markers)
        if conversation.metadata.get("tools") and all(span.owner >= 0 for span in rendering.spans):
            notes += ("tools that the template does not write",)
        outcomes[row] = Outcome(example, notes=notes)
        rows.append(row)
        ids.append(encoded.ids)
        pieces.append(found)
    for place, finding in unproven(ids, pieces, tokenizer).items():
        outcomes[rows[place]] = Outcome(error=_refused(conversations[rows[place]], tokenizer, finding))
    return outcomes


def _notes(conversation: Conversation, encoded: Encoded, markers: tuple[str, ...]) -> tuple[str, ...]:
    notes = ["text of an added token, kept as text"] if encoded.apart else []
    if any(marker in message.content for marker in markers for message in conversation.messages):
        notes.append("text of a marker that the template writes as ordinary text")
    return tuple(notes)


def end_of_turn(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The added tokens that the template writes after every answer, found by rendering two exchanges; mostly one.

    The first follows the content; those after it count where they adjoin and stand after a last answer too.
    """
    words = ("Where to?", "Home.", "And then?", "To bed.")
    probe = Conversation(tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(words)))
    try:
        rendering = located(probe, require_template(tokenizer))
        structure = structure_of(rendering, tokenizer)
        runs = [structure.added_after(content_bounds(rendering, i, words[i])[2]) for i in (1, 3)]
    except TemplateRefusal:
        return ()
    count = next((i for i, (one, other) in enumerate(zip(*runs)) if one != other), min(map(len, runs)))
    return tuple(runs[1][: max(count, 1)])


def as_conversation(given: Any) -> Conversation:
    """A Conversation, also from a list of {"role", "content"} or of Message."""
    if isinstance(given, Conversation):
        return given
    if isinstance(given, list | tuple) and given and all(isinstance(item, Message) for item in given):
        return Conversation(tuple(given))
    if isinstance(given, list | tuple) and all(isinstance(item, Mapping) for item in given):
        return Conversation(tuple(messages_of(list(given), "conversation")))
    raise InputError(f"conversation: found {type(given).__name__}; expected a Conversation or a list of messages")


def as_tokenizer(given: Any) -> Tokenizer:
    """A Tokenizer; one made of a transformers tokenizer is kept with it until its template or vocabulary changes.

    Raises InputError for what is no tokenizer, such as the path of one.
    """
    if isinstance(given, Tokenizer):
        return given
    if not hasattr(given, "chat_template"):
        raise InputError(f"tokenizer: found {type(given).__name__}; expected a transformers fast tokenizer, such as "
                         "transformers.AutoTokenizer.from_pretrained gives")
    kept = given.__dict__.get("_itune_tokenizer")
    if kept is None or kept.size != len(given) or kept.source != given.chat_template:
        kept = given.__dict__["_itune_tokenizer"] = with_template(given)
    return kept


def _refused(conversation: Conversation, tokenizer: Tokenizer, finding: str) -> InputError:
    name = tokenizer.template.name if tokenizer.template else ""
    return InputError(f"{conversation.address}: chat template {name}: {finding}")
