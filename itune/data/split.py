"""What is held out: whole groups (tasks, or conversations with one prompt), chosen by a hash."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from itune.types import Conversation, InputError


def normalised(text: str) -> str:
    """Text without what makes no other question of it: case, width variants, runs of white space, outer punctuation."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"\s+", " ", folded).strip(" \t\n.,;:!?\"'`*#-")


def prompt_text(conversation: Conversation) -> str:
    """What an item asks: every turn before its last assistant turn, system turns left out, normalised."""
    turns = list(conversation.messages)
    while turns and turns[-1].role != "assistant":
        turns.pop()
    return _joined([message.content for message in turns[:-1] if message.role not in ("system", "developer")])


def _joined(texts: list[str]) -> str:
    return "\x1e".join(normalised(text) for text in texts)


def digest(text: str) -> bytes:
    """16 bytes that stand for a text in sets of many."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


class Split:
    """Which conversations are held out: `share` of the groups, chosen by a hash of seed and group.

    The choice of a group depends on nothing else, so more data never moves a group from one side to the other. Where no
    group falls below `share`, the one with the lowest hash is held out.
    """

    def __init__(self, by: str, share: float, seed: int):
        self.by, self.share, self.seed = by, share, seed
        self.groups: set[str] = set()
        self.lowest: tuple[float, str] = (2.0, "")

    def group(self, conversation: Conversation) -> str:
        """The conversation's group: the value of field `by`, or its prompt. Raises InputError for a missing field."""
        if not self.by:
            return digest(prompt_text(conversation)).hex()
        if self.by not in conversation.metadata:
            found = ", ".join(conversation.metadata) or "none"
            raise InputError(f"{conversation.address}: {self.by}: missing, and data.held_out_by splits by it; "
                             f"other fields of the row: {found}")
        return str(conversation.metadata[self.by])

    def see(self, conversation: Conversation) -> None:
        """Take note of a group, before any question whether it is held out."""
        group = self.group(conversation)
        if group not in self.groups:
            self.groups.add(group)
            self.lowest = min(self.lowest, (self._place(group), group))

    def holds_out(self, conversation: Conversation) -> bool:
        group = self.group(conversation)
        return self._place(group) < self.share or (self.lowest[0] >= self.share and group == self.lowest[1])

    def _place(self, group: str) -> float:
        raw = hashlib.blake2b(f"{self.seed}\0{group}".encode(), digest_size=8).digest()
        return int.from_bytes(raw, "big") / 2**64


def hold_out(train: Sequence[Conversation], evaluation: Iterable[Conversation],
             split: Split | None) -> tuple[list[Conversation], dict[str, Any]]:  # fmt: skip
    """(held-out conversations, how they were chosen). `evaluation` are items from files of their own."""
    held = list(evaluation)
    proof: dict[str, Any] = {"from_eval_sources": len(held), "by": "", "share": 0.0, "groups": 0, "groups_held_out": []}
    if split is not None:
        for conversation in train:
            split.see(conversation)
        chosen = [conversation for conversation in train if split.holds_out(conversation)]
        names = sorted({split.group(conversation) for conversation in chosen})
        if len(names) == len(split.groups):
            raise InputError(f"data.held_out_by={split.by or 'conversation'}: all {len(names)} groups would be held "
                             "out; expected at least two groups, or data.held_out_share=0")
        proof |= {"by": split.by or "conversation", "share": split.share, "seed": split.seed,
                  "groups": len(split.groups), "groups_held_out": names if split.by else len(names)}  # fmt: skip
        held += chosen
    return held, proof
