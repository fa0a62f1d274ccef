"""Exact and near duplicates among many rows: MinHash over character 5-grams, banded, then verified exactly.

Exact duplicates have equal normalised text. Near duplicates share at least `threshold` of their distinct 5-grams
(Jaccard), in the question and in the answer, and write the same numbers: two sums over other numbers are two
questions. Signatures of 125 hashes in 25 bands of 5 (Broder 1997; Leskovec, Rajaraman, Ullman 2014, chapter 3) bring
together 99 % of pairs with a similarity of 0.7; every pair that meets is then scored exactly. The first row of a group
stays; each later one names the row it repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from itune.data import similarity, words
from itune.data.findings import Finding, finding
from itune.types import Conversation

GRAM = 5
BANDS, ROWS = 25, 5
NEIGHBOURS = 32  # in one band, each row is compared with so many rows before it, and with the first
_CHUNK = 1_000_000  # characters whose 5-grams exist at one time


def question_and_answer(conversation: Conversation) -> tuple[str, str]:
    """The user's words and the assistant's: both must be alike for a row to repeat another."""
    answers = [message.content for message in conversation.messages if message.role == "assistant"]
    return words.prompt_text(conversation), "\n".join(answers)


def question(conversation: Conversation) -> tuple[str]:
    """The user's words alone: finds repeated prompts, whatever the answers."""
    return (words.prompt_text(conversation),)


def find_duplicates(
    conversations: Sequence[Conversation],
    threshold: float = 0.7,
    parts_of: Callable[[Conversation], tuple[str, ...]] = question_and_answer,
    same_numbers: bool = True,
    near: bool = True,
) -> list[Finding]:
    """One finding for each row that repeats an earlier one: filter `exact_duplicate` or `near_duplicate`.

    `parts_of` gives the texts that must each be alike: two questions about one long passage are no duplicates, for
    their answers differ. The score is the smallest Jaccard similarity of the parts. A row without words is left to
    other filters.
    """
    parts = [tuple(words.normalise(part) for part in parts_of(row)) for row in conversations]
    original, found = exact_duplicates(parts), []
    for row in np.nonzero(original >= 0)[0].tolist():
        found.append(_record("exact_duplicate", "same text", row, int(original[row]), 1.0, conversations))
    if near:
        rows = [row for row, texts in enumerate(parts) if any(texts) and original[row] < 0]
        numbers = [tuple(sorted(words.numbers(" ".join(parts_of(conversations[row]))))) for row in rows]
        near_rows = near_duplicates([parts[row] for row in rows], threshold, numbers if same_numbers else None)
        for row, other, score in near_rows:
            found.append(_record("near_duplicate", "similar text", rows[row], rows[other], score, conversations))
    return sorted(found, key=lambda each: each.index)


def _record(name: str, reason: str, row: int, other: int, score: float, rows: Sequence[Conversation]) -> Finding:
    return finding(name, reason, row, rows[row], score=score, other=other, other_address=str(rows[other].address))


def exact_duplicates(parts: Sequence[tuple[str, ...]]) -> np.ndarray:
    """For each row the first equal one before it, or -1. Empty rows are no duplicates of each other. int64[rows]."""
    first: dict[tuple[str, ...], int] = {}
    original = np.full(len(parts), -1, np.int64)
    for row, texts in enumerate(parts):
        earlier = first.setdefault(texts, row)
        if earlier != row and any(texts):
            original[row] = earlier
    return original


def near_duplicates(
    parts: Sequence[tuple[str, ...]], threshold: float = 0.7, numbers: Sequence[tuple[str, ...]] | None = None
) -> list[tuple[int, int, float]]:
    """(row, earlier row that stays, similarity) of every row that repeats an earlier one.

    Each row is a tuple of normalised texts, not all empty. `numbers`, where given, must be equal in both rows.
    """
    signatures = minhash([" ".join(texts) for texts in parts])
    pairs = candidates(signatures)
    if numbers:
        ids: dict[tuple[str, ...], int] = {}
        kinds = np.array([ids.setdefault(each, len(ids)) for each in numbers])
        pairs = pairs[kinds[pairs[:, 0]] == kinds[pairs[:, 1]]]
    blocks = np.array_split(pairs, len(pairs) // 50_000 + 1)
    estimate = np.concatenate([(signatures[block[:, 0]] == signatures[block[:, 1]]).mean(axis=1) for block in blocks])
    matches: dict[int, tuple[int, float]] = {}
    cache: dict[int, list[np.ndarray]] = {}
    for other, row in pairs[estimate >= threshold - 0.2].tolist():  # over four standard deviations below the threshold
        if row in matches or other in matches:
            continue
        for index in (row, other):
            if index not in cache:
                cache[index] = [np.unique(_shingles([text])[0]) for text in parts[index]]
        score = min(_jaccard(*both) for both in zip(cache[row], cache[other], strict=True))
        if score >= threshold:
            matches[row] = (other, score)
            del cache[row]
    return [(row, other, score) for row, (other, score) in sorted(matches.items())]


def _jaccard(left: np.ndarray, right: np.ndarray) -> float:
    shared = len(np.intersect1d(left, right, assume_unique=True))
    union = len(left) + len(right) - shared
    return shared / union if union else 1.0


def _shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(hash, row) of every character 5-gram; spaces around a text make sure that each has some. uint64, int64."""
    padded = [f"  {text}  " for text in texts]
    codes = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    rows = np.repeat(np.arange(len(padded)), [len(text) for text in padded])
    count = len(codes) - GRAM + 1
    hashes = np.zeros(count, np.uint64)
    for shift in range(GRAM):
        hashes = (hashes << np.uint64(12)) ^ (hashes >> np.uint64(52)) ^ (codes[shift : shift + count])
    inside = rows[:count] == rows[GRAM - 1 :]
    return similarity.mix(hashes[inside]), rows[:count][inside]


def minhash(texts: Sequence[str]) -> np.ndarray:
    """MinHash signatures, uint32[rows, BANDS * ROWS]."""
    generator = np.random.default_rng(20_240_229)
    factors = generator.integers(1, 2**32, BANDS * ROWS, dtype=np.uint32) | np.uint32(1)
    offsets = generator.integers(0, 2**32, BANDS * ROWS, dtype=np.uint32)
    signatures = np.empty((len(texts), BANDS * ROWS), np.uint32)
    for first, last in _chunks(texts):
        hashes, rows = _shingles(texts[first:last])
        short = (hashes >> np.uint64(32)).astype(np.uint32)
        starts = np.searchsorted(rows, np.arange(last - first))
        for column in range(BANDS * ROWS):
            mixed = short * factors[column] + offsets[column]
            mixed ^= mixed >> np.uint32(15)
            signatures[first:last, column] = np.minimum.reduceat(mixed, starts)
    return signatures


def _chunks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    first, size = 0, 0
    for row, text in enumerate(texts):
        size += len(text)
        if size > _CHUNK or row == len(texts) - 1:
            yield first, row + 1
            first, size = row + 1, 0


def candidates(signatures: np.ndarray) -> np.ndarray:
    """Distinct pairs (earlier row, later row) that agree in at least one band, by later row. int64[pairs, 2]."""
    found = [np.zeros(0, np.int64)]
    count = len(signatures)
    for band in range(BANDS):
        keys = np.zeros(count, np.uint64)
        for column in range(band * ROWS, (band + 1) * ROWS):
            keys = similarity.mix(keys + signatures[:, column].astype(np.uint64))
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        starts = np.nonzero(np.append(True, ordered[1:] != ordered[:-1]))[0] if count else np.zeros(0, np.int64)
        place = np.arange(count) - np.repeat(starts, np.diff(np.append(starts, count)))
        for back in range(1, min(NEIGHBOURS, int(place.max(initial=0))) + 1):
            here = np.nonzero(place >= back)[0]
            found.append(order[here] * count + order[here - back])
        far = np.nonzero(place > NEIGHBOURS)[0]
        found.append(order[far] * count + order[far - place[far]])
    pairs = np.unique(np.concatenate(found))
    return np.stack([pairs % max(1, count), pairs // max(1, count)], axis=1)
