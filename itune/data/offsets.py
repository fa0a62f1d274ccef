"""Which characters each token of a text stands for.

A tokenizer tells it for a seventh more of its time. The tokens of most byte-level tokenizers are the text's bytes, cut
in pieces, so their sizes tell it as well. Of such a tokenizer (`kept_by`) nothing but lost bytes could move a token,
and then the sizes add up to less than the text: where they add up to all of it, the places are proven. Else the
tokenizer is asked.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
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
    """Places of the tokens of each text, None where their sizes do not add up to it.

    texts: those for which `tokenizer.keeps_bytes` is true. As in `tokenizers`, a token with some of a
    character's bytes stands for the character.
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


def kept_by(backend: Any, added: Mapping[int, Any]) -> str:
    """Of which texts the tokens are bytes of the text and nothing else: "all", "NFC" (texts normalised so) or "none".

    Whatever puts in a byte (a space before words, an unknown token that is not an added one) or takes white space on
    purpose gives "none". added: id -> added token.
    """
    model, normalizer = backend.model, type(backend.normalizer).__name__
    if type(model).__name__ != "BPE" or type(backend.decoder).__name__ != "ByteLevel":
        return "none"
    if model.byte_fallback or model.continuing_subword_prefix or model.end_of_word_suffix:
        return "none"
    contents = [token.content for token in added.values()]
    if model.unk_token and model.unk_token not in contents:
        return "none"
    if any(token.lstrip or token.rstrip for token in added.values()):
        return "none"
    cut = json.loads(backend.pre_tokenizer.__getstate__()) if backend.pre_tokenizer else {}
    parts = cut.get("pretokenizers", [cut])
    whole = all(_only_cuts(part) for part in parts) and any(part.get("type") == "ByteLevel" for part in parts)
    if not whole or normalizer not in ("NoneType", "NFC"):
        return "none"
    if normalizer == "NFC":
        return "NFC" if all(unicodedata.is_normalized("NFC", content) for content in contents) else "none"
    return "all"


def _only_cuts(part: Mapping[str, Any]) -> bool:
    """Whether a part of a pre-tokenizer keeps every byte and adds none."""
    if part.get("type") == "ByteLevel":
        return not part["add_prefix_space"]
    return part.get("type") == "Digits" or (part.get("type") == "Split" and part["behavior"] != "Removed")


def _sizes(ids: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    sizes = tokenizer.sizes_V[ids]
    if not sizes.all():
        for new in np.unique(ids[sizes == 0]).tolist():
            added = tokenizer.all_added.get(new)
            # one character of a byte-level vocabulary stands for one byte
            size = len(added.content.encode()) if added else len(tokenizer.backend.id_to_token(new))
            tokenizer.sizes_V[new] = size
        sizes = tokenizer.sizes_V[ids]
    return sizes
