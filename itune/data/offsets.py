"""Which characters each token of a text stands for.

A tokenizer tells it for a seventh more of its time. The tokens of a byte-level tokenizer are the text's bytes, cut in
pieces, so their sizes tell it as well; they have to add up to the text, or the tokenizer is asked after all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from itune.data.tokenizer import Tokenizer

Places = tuple[np.ndarray, np.ndarray]  # for each token its first character, and the one after its last


class Encoded:
    """Token ids int32 [n] of a rendering, and which characters each token stands for.

    added: characters of the template's added tokens. encoding or places: where the tokens stand. apart: a text of a
    message would have become an added token.
    """

    def __init__(self, ids: np.ndarray, added: list[tuple[int, int]], encoding: Any = None,
                 places: Places | None = None, apart: bool = False):  # fmt: skip
        self.ids, self.added, self.apart = ids, added, apart
        self._encoding, self._places = encoding, places

    @property
    def places(self) -> Places:
        if self._places is None:
            offsets = np.asarray(self._encoding.offsets, np.int32).reshape(-1, 2)
            self._places = offsets[:, 0], offsets[:, 1]
        return self._places

    def tokens_of(self, start: int, end: int) -> tuple[int, int]:
        """Tokens [first, last) that overlap characters [start, end)."""
        if self._encoding is not None and end > start:
            first, last = self._encoding.char_to_token(start), self._encoding.char_to_token(end - 1)
            if first is not None and last is not None:
                last += 1  # a character of several tokens is found at its first one
                while last < len(self.ids) and self._encoding.token_to_chars(last)[0] < end:
                    last += 1
                return first, last
        starts, ends = self.places
        return int(np.searchsorted(ends, start, side="right")), int(np.searchsorted(starts, end, side="left"))

    def characters_of(self, first: int, last: int) -> tuple[int, int]:
        """Characters that tokens [first, last) stand for."""
        if self._encoding is not None:
            return self._encoding.token_to_chars(first)[0], self._encoding.token_to_chars(last - 1)[1]
        starts, ends = self.places
        return int(starts[first]), int(ends[last - 1])

    def covers(self, token: int, characters: tuple[int, int]) -> bool:
        """Whether one token stands for all of these characters."""
        start, end = self.characters_of(token, token + 1)
        return start <= characters[0] and characters[1] <= end


def counted(texts: Sequence[str], ids: Sequence[np.ndarray], tokenizer: Tokenizer) -> list[Places | None]:
    """Places of the tokens of each text, of which `tokenizer.keeps_bytes`; None where they do not add up to the text.

    As in `tokenizers`, a token with some bytes of a character stands for the character.
    """
    if not texts:
        return []
    sizes = _sizes(np.concatenate(ids), tokenizer)
    ends = np.cumsum(sizes)
    starts = ends - sizes
    found: list[Places | None] = []
    first = before = 0  # tokens and bytes of the texts before
    for text, own in zip(texts, ids):
        last = first + len(own)
        start, end = starts[first:last] - before, ends[first:last] - before
        size = int(end[-1]) if len(own) else 0
        if text.isascii():
            found.append((start, end) if size == len(text) else None)
        else:
            raw = np.frombuffer(text.encode(), np.uint8)
            character = np.cumsum((raw & 0xC0) != 0x80) - 1  # of each byte; those that go on with one begin with 10
            found.append((character[start], character[end - 1] + 1) if size == len(raw) else None)
        first, before = last, before + size
    return found


def _sizes(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    sizes = tokenizer.sizes_V[ids]
    if not sizes.all():
        for new in np.unique(ids[sizes == 0]).tolist():
            added = tokenizer.added.get(new)
            # in a byte-level vocabulary one character stands for one byte
            size = len(added.content.encode()) if added else len(tokenizer.backend.id_to_token(new))
            tokenizer.sizes_V[new] = size
        sizes = tokenizer.sizes_V[ids]
    return sizes
