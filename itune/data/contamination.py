"""Which training texts give away a held-out text: four detectors over normalised words, none of which needs a server.

exact        the normalised texts are equal
containment  a short held-out text (under 13 words) stands whole in the training text
8-gram       over half of the held-out text's own words lie in 8-grams shared with one training text (Tulu 3); 8-grams
             that many texts share are a template, not evidence
tf-idf       the cosine of character n-grams, weighted by rarity, is at least 0.8

Short prompts, on which n-gram overlap alone is blind, are covered by the first, second and fourth. Measured recall and
false alarms: docs/data_quality.md.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from itune.data import similarity, words
from itune.data.similarity import Ragged, Vocabulary

METHODS = ("exact", "containment", "8-gram", "tf-idf")
GRAM = 8
SHORTEST, LONGEST = 3, 12  # words of a text that containment looks for
UNBOUNDED = 6  # so many words count wherever they stand; fewer must be a phrase of their own
_EDGE = re.compile(r"[^\w\s,]|\n")


Found = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Overlap:
    """For each training text the held-out text that it matches (-1: none), how, and how closely (0 to 1)."""

    match: np.ndarray  # int64[training texts]
    method: np.ndarray  # int8[training texts], index into METHODS
    score: np.ndarray  # float32[training texts]


class Comparison:
    """Held-out texts and training texts, encoded once, so that subsets of both can be compared again and again."""

    def __init__(self, held_out: Sequence[str], training: Sequence[str]) -> None:
        vocabulary = Vocabulary()
        self.texts: tuple[list[str], ...] = list(held_out), list(training)
        self.words: tuple[Ragged, ...] = vocabulary.encode(held_out), vocabulary.encode(training)
        self.counts = [similarity.char_counts(encoded, vocabulary) for encoded in self.words]

    def subset(self, held_out: np.ndarray, training: np.ndarray) -> Comparison:
        """The same over some rows of each side, given as indices."""
        part = object.__new__(Comparison)
        chosen = (np.asarray(held_out, np.int64), np.asarray(training, np.int64))
        part.texts = tuple([all_texts[row] for row in rows] for all_texts, rows in zip(self.texts, chosen))
        part.words = tuple(encoded.take(rows) for encoded, rows in zip(self.words, chosen))
        part.counts = [matrix[rows] for matrix, rows in zip(self.counts, chosen)]
        return part

    def overlap(self, grams: float = 0.5, cosine: float = 0.8) -> Overlap:
        """Match every training text against every held-out text. `grams` and `cosine` are the thresholds; 1 is off."""
        queries, base = self.words
        match = np.full(len(base), -1, np.int64)
        method, score = np.zeros(len(base), np.int8), np.zeros(len(base), np.float32)
        nothing = np.full(len(base), -1, np.int64), np.zeros(len(base), np.float32)
        found = (
            _exact(queries, base),
            _contained(queries, base, self.texts[0], self.texts[1]),
            _shared_grams(queries, base, grams) if grams < 1 else nothing,
            self._close(cosine) if cosine < 1 else nothing,
        )
        for number, (query_of_base, score_of_base) in reversed(list(enumerate(found))):  # the strictest method names it
            hit = query_of_base >= 0
            match[hit], method[hit], score[hit] = query_of_base[hit], number, score_of_base[hit]
        return Overlap(match, method, score)

    def _close(self, cosine: float) -> Found:
        asked, known = self._vectors()
        close = similarity.match(asked, known, threshold=cosine, keep=0)
        return close.query_of_base, close.score_of_base

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """The training text nearest to each held-out text (-1: none) and its TF-IDF cosine."""
        asked, known = self._vectors()
        found = similarity.match(asked, known, threshold=2.0)
        return found.nearest, found.nearest_score

    def _vectors(self) -> list[Any]:
        frequency = np.sum([similarity.document_frequency(matrix) for matrix in self.counts], axis=0)
        documents = sum(matrix.shape[0] for matrix in self.counts)
        return [similarity.weighted(matrix, frequency, documents) for matrix in self.counts]


def _exact(queries: Ragged, base: Ragged) -> Found:
    of_text = {queries.row(index).tobytes(): index for index in reversed(range(len(queries)))}
    of_text.pop(b"", None)
    match = np.array([of_text.get(base.row(index).tobytes(), -1) for index in range(len(base))], np.int64)
    return match, (match >= 0).astype(np.float32)


def _windows(texts: Ragged, longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For lengths 1 to `longest`: (hash, first word) of every window of so many words inside a text. uint64, int64."""
    ids, rows = similarity.mix(texts.ids.astype(np.uint64) + np.uint64(1)), texts.rows
    hashes = ids
    for length in range(1, longest + 1):
        if length > 1:
            hashes = similarity.mix(hashes[:-1] + ids[length - 1 :])
        starts = np.nonzero(rows[: len(hashes)] == rows[length - 1 :])[0]
        yield hashes[starts], starts


def _grams(texts: Ragged) -> tuple[np.ndarray, np.ndarray]:
    """(hash, first word) of every 8-gram."""
    *_, last = _windows(texts, GRAM)
    return last


def _contained(queries: Ragged, base: Ragged, held_out: Sequence[str], training: Sequence[str]) -> Found:
    """Held-out texts of few words that stand in a training text: alone between punctuation, or anywhere if longer."""
    match, score = np.full(len(base), -1, np.int64), np.zeros(len(base), np.float32)
    lengths, row_of_word, query_of_word = np.diff(queries.offsets), base.rows, queries.rows
    for length, (asked, there) in enumerate(zip(_windows(queries, LONGEST), _windows(base, LONGEST)), start=1):
        whole = lengths[query_of_word[asked[1]]] == length
        if length < SHORTEST or not whole.any():
            continue
        keys, first = np.unique(asked[0][whole], return_index=True)
        query_of_key = query_of_word[asked[1][whole][first]]
        for place in np.nonzero(np.isin(there[0], keys))[0]:
            row, query = row_of_word[there[1][place]], query_of_key[np.searchsorted(keys, there[0][place])]
            position = int(there[1][place] - base.offsets[row])
            if length >= UNBOUNDED or _stands_alone(held_out[query], training[row], position, length):
                match[row], score[row] = query, length / (base.offsets[row + 1] - base.offsets[row])
    return match, score


def _stands_alone(query: str, text: str, position: int, length: int) -> bool:
    """Whether words position..position+length of the text are a phrase of their own, with an edge on both sides."""
    if len(words.normalise(query).replace(" ", "")) < 8:
        return False
    text = words.fold(text)
    spans = words.spans(text)
    before = text[spans[position - 1][1] : spans[position][0]] if position else "\n"
    last = position + length - 1
    after = text[spans[last][1] : spans[last + 1][0]] if last + 1 < len(spans) else "\n"
    return bool(_EDGE.search(before) and _EDGE.search(after))


def _shared_grams(queries: Ragged, base: Ragged, threshold: float) -> Found:
    """8-gram overlap: the share of a held-out text's own words that lie in 8-grams shared with one training text.

    Words weigh by rarity, ln((1 + n) / (1 + df)), and 8-grams in more than `limit` texts are left out on both sides.
    """
    match, score = np.full(len(base), -1, np.int64), np.zeros(len(base), np.float32)
    hashes, starts = _grams(queries)
    base_hashes, base_starts = _grams(base)
    shared = np.isin(base_hashes, hashes)
    base_hashes, base_rows = _distinct(base_hashes[shared], base.rows[base_starts[shared]])
    query_rows = queries.rows[starts]
    limit = int(np.clip(len(base) // 2000, 10, 100))
    rows_with = _occurrences(base_hashes, hashes)
    own = (rows_with <= limit) & (_occurrences(_distinct(hashes, query_rows)[0], hashes) <= limit)
    hashes, starts, query_rows, rows_with = hashes[own], starts[own], query_rows[own], rows_with[own]
    rarity = np.concatenate([[0], np.cumsum(_rarity(queries, base)[queries.ids])])
    total = np.zeros(len(queries))
    rows, mass = _covered(query_rows, starts, rarity)
    total[rows] = mass
    repeat = np.repeat(np.arange(len(hashes)), rows_with)
    within = np.arange(len(repeat)) - np.repeat(np.cumsum(rows_with) - rows_with, rows_with)
    base_of_pair = base_rows[np.searchsorted(base_hashes, hashes)[repeat] + within]
    pairs, mass = _covered(query_rows[repeat] * len(base) + base_of_pair, starts[repeat], rarity)
    share = mass / np.maximum(total[pairs // max(1, len(base))], 1e-9)
    order = np.argsort(share, kind="stable")
    order = order[share[order] > threshold]
    match[pairs[order] % len(base)] = pairs[order] // len(base)  # the last write, the highest share, stays
    score[pairs[order] % len(base)] = share[order]
    return match, score


def _distinct(hashes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each hash once a row, sorted by hash."""
    order = np.lexsort((rows, hashes))
    hashes, rows = hashes[order], rows[order]
    first = np.ones(len(hashes), bool)
    first[1:] = (hashes[1:] != hashes[:-1]) | (rows[1:] != rows[:-1])
    return hashes[first], rows[first]


def _occurrences(ordered: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.searchsorted(ordered, values, "right") - np.searchsorted(ordered, values, "left")


def _rarity(queries: Ragged, base: Ragged) -> np.ndarray:
    """ln((1 + n) / (1 + df)) of every word id, over both sets of texts."""
    number = int(max([0, *(texts.ids.max(initial=-1) + 1 for texts in (queries, base))]))
    frequency = sum(np.bincount(_distinct(texts.ids, texts.rows)[0], minlength=number) for texts in (queries, base))
    return np.log((1 + len(queries) + len(base)) / (1 + frequency))


def _covered(groups: np.ndarray, starts: np.ndarray, mass: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each distinct group, the mass of the words under its 8-grams; `mass[i]` sums the words before word i."""
    if not len(groups):
        return np.zeros(0, np.int64), np.zeros(0)
    order = np.lexsort((starts, groups))
    groups, starts = groups[order], starts[order]
    last = np.append(groups[1:] != groups[:-1], True)
    ends = np.where(last, starts + GRAM, np.minimum(starts + GRAM, np.append(starts[1:], 0)))
    at = np.nonzero(last)[0]
    return groups[at], np.diff(np.cumsum(mass[ends] - mass[starts])[at], prepend=0)
