"""What becomes of a conversation over the maximum length: dropped, cut by whole turns from the left, split, or cut off.

A turn here is an exchange: a user's message and all that follows it before the next one. System messages stay in front
of every part. No policy leaves a part without a target; what is lost is counted.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from itune.data.render import render_many, truncated
from itune.data.store import supervised
from itune.data.templates import Tokenizer
from itune.types import Conversation, Example


class Part(NamedTuple):
    """What is trained on of a conversation, with its rendering."""

    conversation: Conversation
    example: Example


class Fitted(NamedTuple):
    """Parts that fit; none where the row is dropped, for `reason`. Losses are in tokens of the whole rendering."""

    parts: tuple[Part, ...]
    reason: str = ""
    lost_tokens: int = 0
    lost_targets: int = 0


def fit(conversation: Conversation, example: Example, tokenizer: Tokenizer, max_length: int, policy: str,
        train_on: str = "assistant") -> Fitted:  # fmt: skip
    """The parts of a rendered conversation under a policy: drop, truncate, split or keep_start.

    truncate: the oldest exchanges go until the rest fits; a last exchange that is too long by itself loses its end.
    split: as many exchanges as fit make a part, then the next ones; with `train_on="last"` only the last answer is a
    target, so that splitting is truncating. keep_start: the first tokens, wherever that ends (as TRL does).
    """
    whole = Part(conversation, example)
    if len(example.token_ids) <= max_length:
        return Fitted((whole,))
    if policy == "drop":
        return _judged(whole, [], f"longer than data.max_length ({max_length} tokens)")
    if policy == "keep_start":
        cut = truncated(example, max_length)
        parts: list[Part | None] = [Part(conversation, cut) if cut is not None else None]
    else:
        exchanges = _Exchanges(conversation, tokenizer, max_length, train_on)
        parts = exchanges.split() if policy == "split" and train_on != "last" else [exchanges.newest()]
    return _judged(whole, [part for part in parts if part], f"no target within data.max_length ({max_length} tokens)")


def _judged(whole: Part, parts: list[Part], reason: str) -> Fitted:
    targets = [supervised(part.example) for part in (whole, *parts)]
    lost = len(whole.example.token_ids) - sum(len(part.example.token_ids) for part in parts)
    return Fitted(tuple(parts), "" if parts else reason, max(0, lost), max(0, targets[0] - sum(targets[1:])))


class _Exchanges:
    """The exchanges of one conversation, and renderings of runs of them."""

    def __init__(self, conversation: Conversation, tokenizer: Tokenizer, max_length: int, train_on: str):
        self._conversation, self._tokenizer = conversation, tokenizer
        self._max_length, self._train_on = max_length, train_on
        messages = conversation.messages
        lead = next((i for i, m in enumerate(messages) if m.role not in ("system", "developer")), len(messages))
        self._lead = messages[:lead]
        starts = [lead, *(i for i in range(lead + 1, len(messages)) if messages[i].role == "user")]
        self._bounds = list(zip(starts, [*starts[1:], len(messages)]))
        while self._bounds and not any(m.role == "assistant" for m in messages[slice(*self._bounds[-1])]):
            self._bounds.pop()  # questions without an answer teach nothing

    def newest(self) -> Part | None:
        """The newest exchanges that fit, as many as possible; the beginning of the last where none fits."""
        low, high = -1, len(self._bounds)  # the first exchange of the longest run that fits lies in (low, high]
        best = None
        while high - low > 1:
            middle = (low + high) // 2
            part = self._run(middle, len(self._bounds))
            if part is None:
                low = middle
            else:
                best, high = part, middle
        return best or self._beginning(len(self._bounds) - 1)

    def split(self) -> list[Part | None]:
        """Consecutive runs of exchanges that fit; of an exchange that is too long by itself its beginning."""
        parts: list[Part | None] = []
        start = 0
        while start < len(self._bounds):
            low, high = start, len(self._bounds) + 1  # the run [start, low) fits, [start, high) does not
            best = None
            while high - low > 1:
                middle = (low + high) // 2
                part = self._run(start, middle)
                if part is None:
                    high = middle
                else:
                    best, low = part, middle
            parts.append(best or self._beginning(start))
            start = max(low, start + 1)
        return parts

    def _rendered(self, first: int, last: int) -> Part | None:
        messages = self._conversation.messages[self._bounds[first][0] : self._bounds[last - 1][1]]
        part = dataclasses.replace(self._conversation, messages=(*self._lead, *messages))
        example = render_many([part], self._tokenizer, self._train_on)[0].example
        return Part(part, example) if example is not None else None  # where no message of the run carries weight

    def _run(self, first: int, last: int) -> Part | None:
        part = self._rendered(first, last)
        return part if part and len(part.example.token_ids) <= self._max_length else None

    def _beginning(self, exchange: int) -> Part | None:
        part = self._rendered(exchange, exchange + 1) if exchange >= 0 else None
        cut = truncated(part.example, self._max_length) if part else None
        return Part(part.conversation, cut) if part and cut is not None else None
