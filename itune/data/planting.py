"""Plant known defects in real rows, so that every filter's precision and recall can be measured on the user's own data.

`plant(conversations, kind, rate, seed)` edits or appends rows and returns the truth apart from the rows: nothing in a
planted row tells that it is one. Choose thresholds on one seed, report on others.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from itune.data import planted_texts as texts
from itune.data import rewording, words
from itune.data.findings import Finding
from itune.types import Address, Conversation, InputError


@dataclasses.dataclass(frozen=True)
class Planted:
    """Rows with planted ones among them. `truth` are indices of planted rows, `origin` the rows they were made from."""

    conversations: tuple[Conversation, ...]
    truth: tuple[int, ...]
    origin: tuple[int, ...]


class Rows:
    """The rows to plant in, with what makers look up: answers by task, and whether a task's answers are phrases."""

    def __init__(self, conversations: Sequence[Conversation]) -> None:
        self.all = conversations
        self.by_task: dict[str, list[str]] = collections.defaultdict(list)
        for row in conversations:
            if row.messages and row.messages[-1].role == "assistant":
                self.by_task[self.task(row)].append(row.messages[-1].content)

    @staticmethod
    def task(row: Conversation) -> str:
        return str(row.metadata.get("task", row.address.source))


Maker = Callable[[Conversation, Rows, np.random.Generator], Conversation | None]


def plant(conversations: Sequence[Conversation], kind: str, rate: float = 0.05, seed: int = 0) -> Planted:
    """Plant `kind` in about `rate` of the rows that can carry it.

    Kinds that concern one row replace it in place; kinds that concern pairs (duplicates, contradictions, leaks) append
    rows at the end. Raises InputError for an unknown kind.
    """
    if kind not in KINDS:
        raise InputError(f"plant: unknown kind {kind!r}; expected one of {', '.join(KINDS)}")
    maker, appends = KINDS[kind]
    rng = np.random.default_rng([seed, *kind.encode()])
    rows, out = Rows(conversations), list(conversations)
    wanted = max(1, round(rate * len(conversations)))
    truth: list[int] = []
    origin: list[int] = []
    for index in rng.permutation(len(conversations)).tolist():
        row = conversations[index]
        if len(truth) == wanted:
            break
        if not row.messages or row.messages[-1].role != "assistant" or not row.messages[-1].content.strip():
            continue
        made = maker(row, rows, rng)
        if made is None:
            continue
        if appends:
            line = len(out) + 1
            out.append(dataclasses.replace(made, address=Address(row.address.source, row.address.file, line)))
        else:
            out[index] = made
        truth.append(len(out) - 1 if appends else index)
        origin.append(index)
    return Planted(tuple(out), tuple(truth), tuple(origin))


def plant_pairs(
    conversations: Sequence[Conversation], kinds: Sequence[str], rate: float = 0.05, seed: int = 0
) -> tuple[list[Conversation], dict[str, dict[int, int]]]:
    """Append planted rows of several kinds: (all rows, and for each kind planted row -> the row it was made from)."""
    rows, truth = list(conversations), {}
    for kind in kinds:
        planted = plant(conversations, kind, rate, seed)
        shift = len(rows) - len(conversations)
        truth[kind] = {row + shift: origin for row, origin in zip(planted.truth, planted.origin, strict=True)}
        rows += planted.conversations[len(conversations) :]
    return rows, truth


def judge_pairs(
    found: Sequence[Finding], truth: Mapping[str, Mapping[int, int]], kind: str
) -> tuple[set[int], list[Finding]]:
    """Planted rows of `kind` that were found, and the findings that are wrong.

    A finding is right if it links a planted row of the kind with a row made from the same original, or with the
    original. Whatever else is found, in real rows too, counts as wrong.
    """
    origin_of = {row: origin for planted in truth.values() for row, origin in planted.items()}
    right, wrong = set(), []
    for each in found:
        ends = (each.index, each.other)
        same = origin_of.get(ends[0], ends[0]) == origin_of.get(ends[1], ends[1])
        planted = [row for row in ends if row in truth[kind]]
        if same and planted:
            right.update(planted)
        else:
            wrong.append(each)
    return right, wrong


def answer_of(row: Conversation) -> str:
    return row.messages[-1].content


def prompt_of(row: Conversation) -> str:
    return next((message.content for message in reversed(row.messages) if message.role == "user"), "")


def with_answer(row: Conversation, answer: str) -> Conversation:
    """The conversation with another final answer."""
    last = dataclasses.replace(row.messages[-1], content=answer)
    return dataclasses.replace(row, messages=(*row.messages[:-1], last))


def with_prompt(row: Conversation, prompt: str) -> Conversation:
    """The conversation with another last user message."""
    index = max(i for i, message in enumerate(row.messages) if message.role == "user")
    changed = dataclasses.replace(row.messages[index], content=prompt)
    return dataclasses.replace(row, messages=(*row.messages[:index], changed, *row.messages[index + 1 :]))


def _reworded(row: Conversation, rng: np.random.Generator) -> Conversation:
    """The same question: as it was, in another case or punctuation, or inside a usual phrase."""
    way = int(rng.integers(3))
    edit = (lambda text, rng: text, rewording.recased, rewording.wrapped)[way]
    return with_prompt(row, edit(prompt_of(row), rng))


def contradiction(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    """The same question with an answer that cannot be right as well."""
    ways = [_other_label, _other_number, _negated, _swapped]
    for way in rng.permutation(len(ways)):
        answer = ways[way](row, rows, rng)
        if answer is not None and words.normalise(answer) != words.normalise(answer_of(row)):
            return with_answer(_reworded(row, rng), answer)
    return None


def _other_label(row: Conversation, rows: Rows, rng: np.random.Generator) -> str | None:
    labels = collections.Counter(answer.strip() for answer in rows.by_task[rows.task(row)])
    others = [label for label in labels if label and words.normalise(label) != words.normalise(answer_of(row))]
    few = len(labels) <= 12 and sum(labels.values()) >= 2 * len(labels)
    return str(rng.choice(others)) if few and others else None


def _other_number(row: Conversation, rows: Rows, rng: np.random.Generator) -> str | None:
    found = list(re.finditer(r"(?<![\w.,])\d+(?![\w,]|\.\d)", answer_of(row)))
    if not found:
        return None
    last = found[-1]
    value = int(last.group())
    changed = value + int(rng.integers(1, max(3, value // 2 + 2)))
    return answer_of(row)[: last.start()] + str(changed) + answer_of(row)[last.end() :]


def _negated(row: Conversation, rows: Rows, rng: np.random.Generator) -> str | None:
    answer = answer_of(row)
    opening = re.match(r"\s*(yes|no|true|false)\b", answer, re.IGNORECASE)
    if opening:
        opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[opening[1].lower()]
        opposite = opposite.capitalize() if opening[1][0].isupper() else opposite
        return answer[: opening.start(1)] + opposite + ("" if len(answer.split()) < 4 else ".")
    verb = re.search(r"\b(is|are|was|were|can|will|should|does|has)\b(?! not|n't)", answer)
    if not verb or len(answer.split()) > 60:
        return None
    return answer[: verb.end()] + " not" + answer[verb.end() :]


def _swapped(row: Conversation, rows: Rows, rng: np.random.Generator) -> str | None:
    """The answer to another question: of the same task where answers are phrases, else of any other row."""
    own = words.normalise(answer_of(row))
    short = len(own.split()) <= 8
    donors = rows.by_task[rows.task(row)] if short else [answer_of(other) for other in _sample(rows.all, 20, rng)]
    for index in rng.permutation(len(donors))[:20]:
        other = words.normalise(donors[index])
        if other and other not in own and own not in other and not set(own.split()) & set(other.split()):
            return donors[index]
    return None


def _sample(rows: Sequence[Conversation], count: int, rng: np.random.Generator) -> list[Conversation]:
    chosen = [rows[int(index)] for index in rng.integers(len(rows), size=count)]
    return [row for row in chosen if row.messages and row.messages[-1].role == "assistant"]


def benign_duplicate(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    """The same question with the same answer, said in a slightly different way."""
    answer = answer_of(row)
    ways = [
        lambda text: text,
        lambda text: text.strip().rstrip(".") + ".",
        lambda text: f"The answer is {text.strip()}" if len(text.split()) <= 8 else f"Sure! {text}",
        lambda text: text.lower() if len(text.split()) <= 8 else text + "\n\nI hope this helps.",
        lambda text: re.sub(r"\b(\w+)n't\b", lambda m: m[1] + " not", text) if "won't" not in text else text,
        lambda text: re.sub(r"(?<![\d.,])(\d{1,3})(\d{3})(?![\d.,])", r"\1,\2", text),
        lambda text: f"{text.strip()} (see the question)",
    ]
    return with_answer(_reworded(row, rng), ways[int(rng.integers(len(ways)))](answer))


def sibling(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    """Another question that looks the same: one number of the prompt changed, and the answer with it."""
    found = list(re.finditer(r"(?<![\w.])\d+(?![\w.])", prompt_of(row)))
    answer = _other_number(row, rows, rng) or _swapped(row, rows, rng)
    if not found or answer is None:
        return None
    chosen = found[int(rng.integers(len(found)))]
    prompt = prompt_of(row)
    prompt = prompt[: chosen.start()] + str(int(chosen.group()) + int(rng.integers(1, 9))) + prompt[chosen.end() :]
    return with_answer(with_prompt(row, prompt), answer)


def exact_duplicate(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    return with_prompt(with_answer(row, answer_of(row).strip()), prompt_of(row) + str(rng.choice(["", " ", "\n"])))


def near_duplicate(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    """A few letters or one word in twelve changed, in prompts of at least 12 words."""
    parts = prompt_of(row).split(" ")
    if len(parts) < 12:
        return None
    for index in rng.choice(len(parts), max(1, len(parts) // 24), replace=False):
        word = parts[index]
        if word.isalpha() and len(word) > 3:
            cut = int(rng.integers(1, len(word) - 1))
            parts[index] = word[:cut] + word[cut + 1] + word[cut] + word[cut + 2 :]
        elif word.isalpha():
            parts[index] = ""
    prompt = " ".join(part for part in parts if part)
    return with_prompt(row, prompt) if words.normalise(prompt) != words.normalise(prompt_of(row)) else None


def _leak(edit: Callable[[str, np.random.Generator], str]) -> Maker:
    def make(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
        return with_prompt(row, edit(prompt_of(row), rng))

    return make


def _answer_from(choices: Sequence[str]) -> Maker:
    def make(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
        return with_answer(row, str(rng.choice(choices)))

    return make


def refusal(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    return with_answer(row, " ".join(str(rng.choice(part)) for part in texts.REFUSAL).strip())


def truncated(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    """Answers of at least 12 words, cut anywhere between a third and nine tenths."""
    answer = answer_of(row).rstrip()
    if len(answer.split()) < 12:
        return None
    cut = answer[: int(len(answer) * rng.uniform(0.33, 0.9))].rstrip()
    return None if cut.endswith((".", "!", "?")) else with_answer(row, cut)


def missing_input(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    """The prompt without the text it speaks of: cut after its announcement, or a usual instruction in its place."""
    found = re.search(r"\b(?:following|this|given|below)\b[^.\n:?]{0,60}:\s*\n?", prompt_of(row))
    if found and len(prompt_of(row)[found.end() :].split()) >= 8 and found.end() < 240:
        return with_prompt(row, prompt_of(row)[: found.end()].strip())
    return with_prompt(row, str(rng.choice(texts.ASKS_FOR_INPUT))) if rng.random() < 0.3 else None


def echo(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
    prompt = prompt_of(row).strip()
    if len(prompt.split()) < 5:
        return None
    sentences = [part for part in re.split(r"(?<=[.?!:])\s+|\n+", prompt) if len(part.split()) >= 5]
    ways = [prompt, f"Question: {prompt}", prompt.lower(), prompt.rstrip("?.: ") + "."]
    asked = [part for part in sentences if part.endswith("?")]
    ways += [asked[-1]] * 2 if asked else []
    return with_answer(row, str(rng.choice(ways)))


def _with_inserted(choices: Sequence[str]) -> Maker:
    def make(row: Conversation, rows: Rows, rng: np.random.Generator) -> Conversation | None:
        return with_answer(row, f"{answer_of(row).rstrip()} {rng.choice(choices)}")

    return make


KINDS: dict[str, tuple[Maker, bool]] = {
    "contradiction": (contradiction, True),
    "benign_duplicate": (benign_duplicate, True),
    "sibling": (sibling, True),
    "exact_duplicate": (exact_duplicate, True),
    "near_duplicate": (near_duplicate, True),
    "leak_verbatim": (_leak(lambda text, rng: text), True),
    "leak_cased": (_leak(rewording.recased), True),
    "leak_wrapped": (_leak(rewording.wrapped), True),
    "leak_paraphrased": (_leak(rewording.paraphrased), True),
    "empty": (_answer_from(texts.EMPTY), False),
    "placeholder": (_answer_from(texts.PLACEHOLDERS), False),
    "refusal": (refusal, False),
    "truncated": (truncated, False),
    "script": (_answer_from(texts.OTHER_SCRIPTS), False),
    "language": (_answer_from(texts.OTHER_LANGUAGES), False),
    "missing_input": (missing_input, False),
    "echo": (echo, False),
    "secret": (_with_inserted(texts.SECRETS), False),
    "personal": (_with_inserted(texts.PERSONAL), False),
}
