"""Rendering -> token ids with character offsets, in which no text of a message is an added token.

The whole text is encoded as one string, so that ids equal those of `apply_chat_template`. Then every added token among
them must stand where the template wrote one. If a message's text made another, the text is encoded again apart from the
template's added tokens: those by id, everything between them with a copy of the tokenizer that knows no added token.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from itune.data.provenance import PLACEHOLDER, Rendering
from itune.data.templates import TemplateRefusal, Tokenizer

# What looks like a marker though the tokenizer has no such token: [INST], <<SYS>>, <|user|>, ### User:
MARKERS = re.compile(r"\[/?[A-Z_]{2,}\]|<{1,2}/?[A-Z_]+>{1,2}|<\|\w+\|>|###? \w+:")


@dataclasses.dataclass(frozen=True)
class Structure:
    """What a template writes around texts.

    ids, positions, sizes: its added tokens, where their text starts in the structure, and its length. before: how many
    placeholders stand before each. end_of_span: for each placeholder the added token that follows it with nothing but
    white space between, -1 where there is none. markers: what looks like one and is ordinary text to the tokenizer.
    """

    ids: np.ndarray
    positions: tuple[int, ...]
    sizes: tuple[int, ...]
    before: tuple[int, ...]
    end_of_span: tuple[int, ...]
    markers: tuple[str, ...]

    def added_after(self, span: int) -> list[int]:
        """Ids of the added token that ends a placeholder, and of those that follow it with nothing between."""
        number, found = self.end_of_span[span], []
        while 0 <= number < len(self.ids):
            found.append(int(self.ids[number]))
            number += 1
            if number < len(self.ids) and self.positions[number] != self.positions[number - 1] + self.sizes[number - 1]:
                break
        return found


class Encoded:
    """Token ids int32 [n] of a rendering, and which characters each token stands for."""

    def __init__(self, ids: np.ndarray, added: list[tuple[int, int]], encoding: Any = None, offsets: Any = None):
        self.ids, self.added, self._encoding = ids, added, encoding
        self.apart = encoding is None
        self._offsets = offsets

    @property
    def offsets(self) -> np.ndarray:
        """int32 [n, 2]: first character, and the one after the last."""
        if self._offsets is None:
            self._offsets = self._encoding.offsets
        if not isinstance(self._offsets, np.ndarray):
            self._offsets = np.asarray(self._offsets, np.int32).reshape(-1, 2)
        return self._offsets

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Tokens [first, last) that overlap characters [start, end)."""
        if self._encoding is not None and end > start:
            first, last = self._encoding.char_to_token(start), self._encoding.char_to_token(end - 1)
            if first is not None and last is not None:
                last += 1  # a character of several tokens is found at its first one
                while last < len(self.ids) and self._encoding.token_to_chars(last)[0] < end:
                    last += 1
                return first, last
        first = int(np.searchsorted(self.offsets[:, 1], start, side="right"))
        return first, int(np.searchsorted(self.offsets[:, 0], end, side="left"))

    def characters_of(self, first: int, last: int) -> tuple[int, int]:
        """Characters that tokens [first, last) stand for."""
        if self._encoding is not None:
            return self._encoding.token_to_chars(first)[0], self._encoding.token_to_chars(last - 1)[1]
        return int(self.offsets[first, 0]), int(self.offsets[last - 1, 1])


def encode_many(renderings: Sequence[Rendering], tokenizer: Tokenizer) -> list[Encoded | TemplateRefusal]:
    """Renderings as tokens, as one batch; a refusal where a text cannot be kept from being an added token."""
    encodings = tokenizer.backend.encode_batch([r.text for r in renderings], add_special_tokens=False)
    return [_encoded(rendering, encoding, tokenizer) for rendering, encoding in zip(renderings, encodings)]


def structure_of(rendering: Rendering, tokenizer: Tokenizer) -> Structure:
    """The structure of a rendering; conversations of the same roles share one, so it is kept with the tokenizer."""
    kept = tokenizer.structures
    if rendering.structure not in kept:
        if len(kept) > 10_000:
            kept.clear()
        kept[rendering.structure] = _read_structure(rendering.structure, tokenizer)
    return kept[rendering.structure]


def _read_structure(text: str, tokenizer: Tokenizer) -> Structure:
    encoding = tokenizer.backend.encode(text, add_special_tokens=False)
    ids, positions, sizes = [], [], []
    ordinary = text
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets):
        flags = tokenizer.added.get(token_id)
        if flags is None or PLACEHOLDER in text[start:end]:
            continue  # a placeholder that becomes the unknown token is not the template's
        inside = text.find(flags.content, start, end)  # the token may have taken white space around it
        position, size = (inside, len(flags.content)) if inside >= 0 else (start, end - start)
        ids.append(token_id)
        positions.append(position)
        sizes.append(size)
        ordinary = ordinary[:position] + " " * size + ordinary[position + size :]
    ends = []
    for place in (i for i, sign in enumerate(text) if sign == PLACEHOLDER):
        following = bisect.bisect(positions, place)
        near = following < len(ids) and not text[place + 1 : positions[following]].strip()
        ends.append(following if near else -1)
    before = tuple(text.count(PLACEHOLDER, 0, position) for position in positions)
    markers = tuple(dict.fromkeys(MARKERS.findall(ordinary)))
    return Structure(np.asarray(ids, np.int32), tuple(positions), tuple(sizes), before, tuple(ends), markers)


def _encoded(rendering: Rendering, encoding: Any, tokenizer: Tokenizer) -> Encoded | TemplateRefusal:
    structure = structure_of(rendering, tokenizer)
    shift = [0]
    for span in rendering.spans:
        shift.append(shift[-1] + span.end - span.start - 1)
    places = [position + shift[before] for position, before in zip(structure.positions, structure.before)]
    added = [(place, place + size) for place, size in zip(places, structure.sizes)]
    ids = np.asarray(encoding.ids, np.int32)
    at = np.flatnonzero(tokenizer.is_added_V[ids])
    if np.array_equal(ids[at], structure.ids) and all(
        _covers(encoding.token_to_chars(token), expected) for token, expected in zip(at.tolist(), added)
    ):
        return Encoded(ids, added, encoding)
    try:
        return _encode_apart(rendering.text, structure, added, tokenizer)
    except TemplateRefusal as error:
        return error


def _covers(found: tuple[int, int] | None, expected: tuple[int, int]) -> bool:
    return found is not None and found[0] <= expected[0] and found[1] >= expected[1]


def _encode_apart(text: str, structure: Structure, added: list[tuple[int, int]], tokenizer: Tokenizer) -> Encoded:
    ids: list[int] = []
    offsets: list[tuple[int, int]] = []
    cursor = 0
    for token_id, (start, end) in zip(structure.ids.tolist(), added):
        flags = tokenizer.added[token_id]  # a token may take the white space on its left or right, messages' too
        before = max(cursor, len(text[:start].rstrip())) if flags.lstrip else start
        _add_ordinary(text, cursor, before, tokenizer, ids, offsets)
        cursor = len(text) - len(text[end:].lstrip()) if flags.rstrip else end
        ids.append(token_id)
        offsets.append((before, cursor))
    _add_ordinary(text, cursor, len(text), tokenizer, ids, offsets)
    return Encoded(np.asarray(ids, np.int32), added, offsets=offsets)


def _add_ordinary(text: str, start: int, end: int, tokenizer: Tokenizer, ids: list[int],
                  offsets: list[tuple[int, int]]) -> None:  # fmt: skip
    if start >= end:
        return
    part = tokenizer.plain_backend.encode(text[start:end], add_special_tokens=False)
    made = [i for i in part.ids if tokenizer.is_added_V[i] and i != tokenizer.hf.unk_token_id]
    if made:
        raise TemplateRefusal(f"the tokenizer makes the added token {tokenizer.added[made[0]].content!r} of ordinary "
                              "text; expected messages without it")
    ids.extend(part.ids)
    offsets.extend((a + start, b + start) for a, b in part.offsets)
