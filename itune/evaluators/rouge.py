"""ROUGE-L: the longest common subsequence of stemmed words, as F (Lin 2004); equal to `rouge_score`, stemmer on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from itune.evaluators.porter import stem

_NO_WORD = re.compile(r"[^a-z0-9]+")


def score(item: Mapping[str, Any], answer: str) -> float:
    """ROUGE-L F in [0, 1] against the item's reference; the best one where the metadata has a list `references`."""
    more = item.get("metadata", {}).get("references") or ()
    references = [item["reference"], *(text for text in more if isinstance(text, str))]
    return max(rouge_l(reference, answer) for reference in references)


def rouge_l(reference: str, answer: str, stemmed: bool = True) -> float:
    """F of precision and recall of the longest common subsequence of words; 0 where either text has none.

    Words are runs of a-z and 0-9 in lower case (letters of other alphabets are no words here, as in `rouge_score`);
    those of more than three letters are stemmed.
    """
    wanted, found = words(reference, stemmed), words(answer, stemmed)
    if not wanted or not found:
        return 0.0
    common = longest_common_subsequence(wanted, found)
    return 2 * common / (len(wanted) + len(found))  # F of common/found and common/wanted


def words(text: str, stemmed: bool = True) -> list[str]:
    found = _NO_WORD.sub(" ", text.lower()).split()
    return [stem(word) if stemmed and len(word) > 3 else word for word in found]


def longest_common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """Its length, bit-parallel over `one` (Hyyro 2004): a bit of `row` is 0 where the subsequence has grown."""
    places: dict[str, int] = {}
    for at, word in enumerate(one):
        places[word] = places.get(word, 0) | 1 << at
    full = (1 << len(one)) - 1
    row = full
    for word in other:
        kept = row & places.get(word, 0)
        row = (row + kept | row - kept) & full
    return len(one) - row.bit_count()
