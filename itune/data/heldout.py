"""Held out, provably: clear training of what gives a held-out item away, and prove that nothing is left.

Rows are removed until a whole pass over what is left finds nothing. The proof then records for every held-out item the
hash of its text and the nearest text left in training, with the score. Too few novel prompts stop the run.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from itune.data import contamination, words
from itune.data.findings import Finding, finding, tally
from itune.types import Conversation, InputError, RunError

LONG_ENOUGH = 8  # words that one user message of several in a held-out item needs to be looked for on its own


@dataclasses.dataclass(frozen=True)
class Decontaminated:
    """What is left. `train` and `held_out` index the given sequences; `findings` say what went, and why."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    findings: tuple[Finding, ...]
    proof: dict[str, Any]


def decontaminate(
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    *,
    remove: str = "train",
    minimum: int = 0,
    grams: float = 0.5,
    cosine: float = 0.8,
) -> Decontaminated:
    """Remove training rows that match a held-out prompt (or, with `remove="held_out"`, the held-out items they match).

    Every user message of a training row is compared. Raises RunError when fewer than `minimum` distinct novel prompts
    remain.
    """
    if remove not in ("train", "held_out"):
        raise InputError(f"decontaminate: remove={remove!r}; expected 'train' or 'held_out'")
    keep_held, keep_train = np.ones(len(held_out), bool), np.ones(len(train), bool)
    found: list[Finding] = []
    compared = None
    if held_out:  # training rows are not taken apart for nothing
        pieces = _pieces(held_out), _pieces(train, shortest=1)
        whole = contamination.Comparison(pieces[0].texts, pieces[1].texts)
    while held_out:  # what counts as a template depends on the rows that are left, so look again until nothing is found
        chosen = [np.nonzero(keep[part.rows])[0] for keep, part in zip((keep_held, keep_train), pieces)]
        compared = whole.subset(*chosen)
        result = compared.overlap(grams, cosine)
        hits = np.nonzero(result.match >= 0)[0]
        if not len(hits):
            break
        items = pieces[0].rows[chosen[0][result.match[hits]]]
        rows = pieces[1].rows[chosen[1][hits]]
        found += _best([
            _record(train, held_out, remove, int(row), int(item), int(result.method[hit]), float(result.score[hit]))
            for row, item, hit in zip(rows, items, hits)
        ])
        keep = keep_train if remove == "train" else keep_held
        keep[rows if remove == "train" else items] = False
    kept_train, kept_held = np.nonzero(keep_train)[0].tolist(), np.nonzero(keep_held)[0].tolist()
    proof = _proof([train[i] for i in kept_train], [held_out[i] for i in kept_held], compared, minimum)
    proof["thresholds"] = {"8-gram": grams, "tf-idf": cosine}
    proof["removed"] = {"from": remove, "rows": len(found), "reasons": tally(found).get("contamination", {})}
    return Decontaminated(tuple(kept_train), tuple(kept_held), tuple(found), proof)


def _record(
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    remove: str,
    row: int,
    item: int,
    method: int,
    score: float,
) -> Finding:
    reason = contamination.METHODS[method]
    if remove == "train":
        address = str(held_out[item].address)
        return finding("contamination", reason, row, train[row], score=score, other=item, other_address=address)
    address = str(train[row].address)
    return finding("contamination", reason, item, held_out[item], score=score, other=row, other_address=address)


def _best(records: Sequence[Finding]) -> list[Finding]:
    """One finding a row, the one with the highest score."""
    best: dict[int, Finding] = {}
    for record in records:
        if record.index not in best or record.score > best[record.index].score:
            best[record.index] = record
    return [best[index] for index in sorted(best)]


def prove(
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    minimum: int = 0,
    grams: float = 0.5,
    cosine: float = 0.8,
) -> dict[str, Any]:
    """The proof as a JSON object (`heldout_proof.json`): methods, thresholds, counts, and one record a held-out item.

    Item: address, sha256 of the normalised prompt, nearest training row and its cosine. Raises RunError when an item
    matches a training row, or when fewer than `minimum` distinct prompts are held out.
    """
    queries, base = _pieces(held_out), _pieces(train, shortest=1)
    compared = contamination.Comparison(queries.texts, base.texts)
    result = compared.overlap(grams, cosine)
    hits = np.nonzero(result.match >= 0)[0]
    if len(hits):
        item, row = queries.rows[result.match[hits[0]]], base.rows[hits[0]]
        raise RunError(f"held-out proof: {held_out[item].address} matches training row {train[row].address} "
                       f"({contamination.METHODS[result.method[hits[0]]]}, {result.score[hits[0]]:.2f}); "
                       f"{len(set(base.rows[hits].tolist()))} training rows match in all")
    return _proof(train, held_out, compared, minimum) | {"thresholds": {"8-gram": grams, "tf-idf": cosine}}


def _proof(
    train: Sequence[Conversation],
    held_out: Sequence[Conversation],
    compared: contamination.Comparison | None,
    minimum: int,
) -> dict[str, Any]:
    hashes = [words.prompt_digest(row) for row in held_out]
    novel = len(set(hashes))
    if novel < minimum:
        raise InputError(f"held out: {novel} distinct novel prompts remain of {len(held_out)} items; data.novel_min "
                       f"asks for {minimum}. Hold out more groups (data.held_out_share) or lower data.novel_min")
    near, score = np.zeros(0, np.int64), np.zeros(0, np.float32)
    if held_out and compared is not None:
        first_piece = np.unique(_pieces(held_out).rows, return_index=True)[1]  # an item's whole prompt
        near, score = (part[first_piece] for part in compared.nearest())
        row_of_text = _pieces(train, shortest=1).rows
    items = [
        {
            "address": str(row.address),
            "sha256": digest,
            "nearest": str(train[row_of_text[index]].address) if index >= 0 else "",
            "score": round(float(value), 4),
        }
        for row, digest, index, value in zip(held_out, hashes, near, score, strict=True)
    ]
    highest = max((round(float(value), 4) for value in score), default=0.0)
    return {
        "methods": list(contamination.METHODS), "novel_prompts": novel, "novel_min": minimum, "highest_score": highest,
        "train_rows": len(train), "train_sha256": _digest(train), "held_out_items": len(items), "items": items,
    }


def _digest(rows: Sequence[Conversation]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(words.whole_text(row).encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


class _Pieces(NamedTuple):
    """The texts to compare and the row of each: the whole prompt first, then the longer user messages of several."""

    texts: list[str]
    rows: np.ndarray


def _pieces(rows: Sequence[Conversation], shortest: int = LONG_ENOUGH) -> _Pieces:
    texts, row_of_text = [], []
    for index, row in enumerate(rows):
        asked = [message.content for message in row.messages if message.role == "user"]
        parts = [words.prompt_text(row)]
        if len(asked) > 1:
            parts += [text for text in asked if len(words.words(text)) >= shortest]
        texts += parts
        row_of_text += [index] * len(parts)
    return _Pieces(texts, np.array(row_of_text, np.int64))


def summary(proof: Mapping[str, Any]) -> str:
    """One line for the log."""
    removed = proof.get("removed", {})
    reasons = ", ".join(f"{count} {name}" for name, count in removed.get("reasons", {}).items()) or "nothing"
    return (f"held out {proof['held_out_items']} items, {proof['novel_prompts']} novel prompts; removed from "
            f"{removed.get('from', 'train')}: {reasons}; closest pair left {proof['highest_score']:.2f}")
