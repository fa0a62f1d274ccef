"""Similarity of texts by hashed character n-grams: sparse TF-IDF vectors, and the matches between two sets of texts.

n-grams of 3 to 5 characters inside words, padded with a space on both sides (scikit-learn's `char_wb`), hashed into
2**20 buckets, weighted by term frequency times rarity, scaled to length 1. Candidates are found with a signed random
projection (count sketch, Charikar, Chen, Farach-Colton 2002), whose error at width 2048 has a
standard deviation of at most 0.03; every candidate's cosine is then computed exactly.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from itune.data import words

BUCKETS = 1 << 20
SKETCH = 2048
SKETCH_ERROR = 0.13  # more than four standard deviations of the projection
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def mix(values: np.ndarray) -> np.ndarray:
    """A 64-bit finaliser (splitmix64): spreads uint64 values evenly over the whole range."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclasses.dataclass(frozen=True)
class Ragged:
    """Texts as word ids: row r is `ids[offsets[r]:offsets[r + 1]]`. ids int32[words], offsets int64[rows + 1]."""

    ids: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> np.ndarray:
        return self.ids[self.offsets[index] : self.offsets[index + 1]]

    def take(self, rows: np.ndarray) -> Ragged:
        """The given rows, in their order."""
        lengths = np.diff(self.offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(self.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
        return Ragged(self.ids[source], offsets)

    @property
    def rows(self) -> np.ndarray:
        """The row of every word."""
        return np.repeat(np.arange(len(self)), np.diff(self.offsets))


class Vocabulary:
    """Numbers words in order of appearance; texts that are to be compared share one."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def encode(self, texts: Iterable[str]) -> Ragged:
        """Normalised words of the texts as ids; unseen words get the next number."""
        number, flat, lengths = self.ids.setdefault, array("i"), [0]
        for text in texts:
            flat.extend([number(word, len(self.ids)) for word in words.words(text)])
            lengths.append(len(flat))
        return Ragged(np.frombuffer(flat, np.int32) if flat else np.zeros(0, np.int32), np.asarray(lengths, np.int64))


def char_counts(texts: Ragged, vocabulary: Vocabulary, shortest: int = 3, longest: int = 5) -> Any:
    """Counts of hashed character n-grams as a scipy CSR matrix of float32, (rows, BUCKETS).

    The n-grams never cross a word, so each word of the vocabulary is cut up once.
    """
    from scipy import sparse

    used, column = np.unique(texts.ids, return_inverse=True)
    ones = np.ones(len(column), np.float32)
    bags = sparse.csr_matrix((ones, column, texts.offsets), shape=(len(texts), len(used)))
    bags.sum_duplicates()
    spelled = list(vocabulary.ids)
    return bags @ _word_grams([spelled[index] for index in used], shortest, longest)


def _word_grams(spelled: Sequence[str], shortest: int, longest: int) -> Any:
    """(words, BUCKETS) counts of the character n-grams of each word, a space before and after it."""
    from scipy import sparse

    codes = np.frombuffer("".join(f" {word} " for word in spelled).encode("utf-32-le", "surrogatepass"), np.uint32)
    rows = np.repeat(np.arange(len(spelled)), [len(word) + 2 for word in spelled])
    hashes, found_rows, found_buckets = codes.astype(np.uint64), [], []
    for length in range(2, min(longest, len(codes)) + 1):
        hashes = hashes[:-1] * _MULTIPLIER + codes[length - 1 :]
        if length < shortest:
            continue
        inside = rows[: len(hashes)] == rows[length - 1 :]
        found_rows.append(rows[: len(hashes)][inside])
        found_buckets.append((mix(hashes[inside]) >> np.uint64(44)).astype(np.int64))
    row, bucket = (np.concatenate([np.zeros(0, np.int64), *part]) for part in (found_rows, found_buckets))
    matrix = sparse.csr_matrix((np.ones(len(row), np.float32), (row, bucket)), shape=(len(spelled), BUCKETS))
    matrix.sum_duplicates()
    return matrix


def document_frequency(matrix: Any) -> np.ndarray:
    """In how many rows each bucket occurs."""
    return np.bincount(matrix.indices, minlength=BUCKETS)


def weighted(matrix: Any, frequency: np.ndarray, documents: int) -> Any:
    """Counts -> TF-IDF rows of length 1: tf * (ln((5 + n) / (5 + df)) + 0.5) ** 2.

    Rarity counts more than in the usual formula (ln((1 + n) / (1 + df)) + 1), so that rows of one template are told
    apart by what fills it; among few texts, where rarity says little, it counts less.
    """
    idf = ((np.log((5 + documents) / (5 + frequency)) + 0.5) ** 2).astype(np.float32)
    scaled = matrix.copy()
    scaled.data = matrix.data * idf[matrix.indices]
    lengths = np.diff(matrix.indptr)
    rows = np.repeat(np.arange(matrix.shape[0]), lengths)
    norm = np.sqrt(np.bincount(rows, weights=scaled.data.astype(np.float64) ** 2, minlength=matrix.shape[0]))
    scaled.data /= np.repeat(np.maximum(norm, 1e-12), lengths).astype(np.float32)
    return scaled


def sketch(matrix: Any, width: int = SKETCH) -> np.ndarray:
    """Signed random projection of sparse rows to (rows, width) float32; inner products are kept on average."""
    bucket_hash = mix(np.arange(BUCKETS, dtype=np.uint64) + np.uint64(0x51ED270B))
    column = (bucket_hash % np.uint64(width)).astype(np.int64)
    sign = np.where(bucket_hash >> np.uint64(63), 1, -1).astype(np.float32)
    rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
    flat = np.bincount(
        rows * width + column[matrix.indices],
        weights=matrix.data * sign[matrix.indices],
        minlength=matrix.shape[0] * width,
    )
    return flat.astype(np.float32).reshape(matrix.shape[0], width)


def cosines(left: Any, left_rows: np.ndarray, right: Any, right_rows: np.ndarray) -> np.ndarray:
    """Exact cosine of the given pairs of rows of two matrices whose rows have length 1."""
    out = np.empty(len(left_rows), np.float32)
    for first in range(0, len(left_rows), 20_000):
        part = slice(first, first + 20_000)
        out[part] = np.asarray(left[left_rows[part]].multiply(right[right_rows[part]]).sum(axis=1)).ravel()
    return out


@dataclasses.dataclass(frozen=True)
class Matches:
    """For each base row the closest query, and for each query the closest base row. -1 stands for none."""

    query_of_base: np.ndarray  # int64[base rows], -1 where no query reaches the threshold
    score_of_base: np.ndarray  # float32[base rows]
    nearest: np.ndarray  # int64[queries]
    nearest_score: np.ndarray  # float32[queries]


def match(queries: Any, base: Any, threshold: float, keep: int = 16) -> Matches:
    """Match the rows of two TF-IDF matrices: cosines of at least `threshold`, and the nearest base row of each query.

    The nearest row is the best, by exact cosine, of the `keep` rows whose projections are nearest (none with 0).
    Memory is bounded by blocks of base rows, however many pairs match.
    """
    n_query, n_base = queries.shape[0], base.shape[0]
    query_of_base, score_of_base = np.full(n_base, -1, np.int64), np.zeros(n_base, np.float32)
    top_score, top_row = np.full((n_query, keep), -np.inf, np.float32), np.zeros((n_query, keep), np.int64)
    projected = sketch(queries)
    for first in range(0, n_base if n_query else 0, 4096):
        block = projected @ sketch(base[first : first + 4096]).T
        near_query, near_base = np.nonzero(block >= threshold - SKETCH_ERROR)
        score = cosines(queries, near_query, base, near_base + first)
        order = np.argsort(score, kind="stable")
        order = order[score[order] >= threshold]
        query_of_base[first + near_base[order]] = near_query[order]  # the last write, the highest score, stays
        score_of_base[first + near_base[order]] = score[order]
        if keep:
            top_score, top_row = _merge_top(top_score, top_row, block, first)
    nearest, nearest_score = _nearest(queries, base, top_row, top_score)
    return Matches(query_of_base, score_of_base, nearest, nearest_score)


def _merge_top(
    top_score: np.ndarray, top_row: np.ndarray, block: np.ndarray, first: int
) -> tuple[np.ndarray, np.ndarray]:
    """The highest scores and their rows, after one more block of base rows."""
    keep = top_score.shape[1]
    wide = np.concatenate([top_score, block], axis=1)
    rows = np.concatenate([top_row, np.broadcast_to(np.arange(first, first + block.shape[1]), block.shape)], axis=1)
    best = np.argpartition(-wide, keep - 1, axis=1)[:, :keep]
    return np.take_along_axis(wide, best, 1), np.take_along_axis(rows, best, 1)


def _nearest(queries: Any, base: Any, top_row: np.ndarray, top_score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The row of each query's candidates with the highest exact cosine; -1 and 0 where there is no base row."""
    n_query, keep = top_row.shape
    if n_query == 0 or base.shape[0] == 0 or keep == 0:
        return np.full(n_query, -1, np.int64), np.zeros(n_query, np.float32)
    exact = cosines(queries, np.repeat(np.arange(n_query), keep), base, top_row.ravel()).reshape(n_query, keep)
    exact = np.where(np.isfinite(top_score), exact, -1)
    choice = exact.argmax(axis=1)[:, None]
    return np.take_along_axis(top_row, choice, 1)[:, 0], np.take_along_axis(exact, choice, 1)[:, 0]
