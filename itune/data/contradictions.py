"""Pairs of rows that ask the same and answer incompatibly, and which of them to drop.

Rows whose prompts ask the same question (`itune.data.questions`) are compared answer by answer (`itune.data.answers`).
The method follows data sets that were planted with contradictions; measured precision and recall:
docs/data_quality.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from itune.data import questions, words
from itune.data.answers import Answer, incompatible, numbers_of
from itune.data.findings import Finding, finding
from itune.types import Conversation

MOST_ANSWERS = 5  # a question with so many different answers has no single right one


def find_contradictions(conversations: Sequence[Conversation]) -> list[Finding]:
    """One finding a pair of rows that ask the same and answer incompatibly; `other` is the earlier row.

    The last answer of each conversation is judged, given everything before it. The reason is label, option, final
    answer, number, negation, opposite, name, divergent or unrelated.
    """
    asked = [_last_turn(row) for row in conversations]
    tokens = [questions.tokens(turn.context) if turn else [] for turn in asked]
    numbers = [sorted(numbers_of(turn.context)) if turn else [] for turn in asked]
    answers: dict[int, Answer] = {}
    found = []
    for earlier, row in questions.same_question_pairs(tokens).tolist():
        one, other = asked[earlier], asked[row]
        if one is None or other is None or numbers[earlier] != numbers[row]:
            continue
        if not questions.same_question(tokens[earlier], tokens[row]):
            continue
        answers.setdefault(earlier, Answer.of(one.response))
        answers.setdefault(row, Answer.of(other.response))
        reason = incompatible(answers[earlier], answers[row], other.context, questions.open_ended(other.context))
        if reason:
            address = str(conversations[earlier].address)
            record = finding("contradiction", reason, row, conversations[row], other=earlier, other_address=address)
            found.append(record)
    return _of_one_answer(found, {row: answer.normal for row, answer in answers.items()})


def _last_turn(row: Conversation) -> words.Turn | None:
    return max(words.turns(row), key=lambda turn: turn.index, default=None)


def _groups(found: Sequence[Finding]) -> list[list[Finding]]:
    """The pairs by question: pairs that share a row, directly or through others, belong together."""
    root: dict[int, int] = {}

    def find(row: int) -> int:
        while root.setdefault(row, row) != row:
            root[row] = row = root[root[row]]
        return row

    for each in found:
        root[find(each.index)] = find(each.other)
    groups: dict[int, list[Finding]] = {}
    for each in found:
        groups.setdefault(find(each.index), []).append(each)
    return list(groups.values())


def _of_one_answer(found: Sequence[Finding], answers: Mapping[int, str]) -> list[Finding]:
    """Without the questions to which so many rows give so many different answers that none can be the right one."""
    kept = []
    for group in _groups(found):
        rows = {row for each in group for row in (each.index, each.other)}
        if len({answers[row] for row in rows}) < MOST_ANSWERS:
            kept += group
    return sorted(kept, key=lambda each: (each.index, each.other))


def minority(found: Sequence[Finding], conversations: Sequence[Conversation]) -> list[int]:
    """Rows to drop so that only the most frequent answer of every contradicted question stays.

    Rows count as one vote each; where no answer has more votes than every other, all rows of the question go.
    """
    votes_for: dict[int, list[int]] = {}
    texts = [words.normalise(turn.response) if (turn := _last_turn(row)) else "" for row in conversations]
    dropped: set[int] = set()
    asked = {row for each in found for row in (each.index, each.other)}
    for group in _groups(found):
        rows = sorted({row for each in group for row in (each.index, each.other)})
        votes_for.update({row: [other for other in rows if texts[other] == texts[row]] for row in rows})
        ranked = sorted({tuple(votes_for[row]) for row in rows}, key=lambda voters: -len(voters))
        won = ranked[0] if len(ranked) > 1 and len(ranked[0]) > len(ranked[1]) else ()
        dropped |= set(rows) - set(won)
    return sorted(dropped & asked)
