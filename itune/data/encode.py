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

from itune.data.offsets import Encoded, Places, counted
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


def encode_many(renderings: Sequence[Rendering], tokenizer: Tokenizer) -> list[Encoded | TemplateRefusal]:
    """Renderings as tokens, in batches; a refusal where a text cannot be kept from being an added token."""
    kept = [row for row, rendering in enumerate(renderings) if tokenizer.keeps_bytes(rendering.text)]
    texts = [renderings[row].text for row in kept]
    fast = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.asarray(encoding.ids, np.int32) for encoding in fast]
    found: dict[int, tuple[np.ndarray, Any, Places | None]] = {
        row: (own, None, places) for row, own, places in zip(kept, ids, counted(texts, ids, tokenizer)) if places
    }
    rest = [row for row in range(len(renderings)) if row not in found]
    encodings = tokenizer.backend.encode_batch([renderings[row].text for row in rest], add_special_tokens=False)
    found |= {row: (np.asarray(each.ids, np.int32), each, None) for row, each in zip(rest, encodings)}
    return [_encoded(rendering, *found[row], tokenizer) for row, rendering in enumerate(renderings)]


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


def _encoded(rendering: Rendering, ids: np.ndarray, encoding: Any, places: Places | None, tokenizer: Tokenizer
             ) -> Encoded | TemplateRefusal:  # fmt: skip
    structure = structure_of(rendering, tokenizer)
    shift = [0]
    for span in rendering.spans:
        shift.append(shift[-1] + span.end - span.start - 1)
    begins = [position + shift[before] for position, before in zip(structure.positions, structure.before)]
    added = [(begin, begin + size) for begin, size in zip(begins, structure.sizes)]
    encoded = Encoded(ids, added, encoding, places)
    at = np.flatnonzero(tokenizer.is_added_V[ids])
    if ids[at].tolist() == structure.ids.tolist() and all(map(encoded.covers, at.tolist(), added)):
        return encoded
    try:
        return _encode_apart(rendering.text, structure, added, tokenizer)
    except TemplateRefusal as error:
        return error


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
    starts, ends = np.asarray(offsets, np.int32).reshape(-1, 2).T
    return Encoded(np.asarray(ids, np.int32), added, places=(starts, ends), apart=True)


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
