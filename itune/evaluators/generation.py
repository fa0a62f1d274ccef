"""Answers to held-out instructions, scored against the reference or by a checker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from itune.config import Config
from itune.decode import generate_ids
from itune.evaluators import rouge, stats
from itune.evaluators.labels import broken_down, labels
from itune.evaluators.paired import named
from itune.evaluators.scoring import exact, find_checker, normalized
from itune.types import Address, Conversation, Message, RunError

MEASURES = ("exact", "normalized", "rouge_l", "stopped", "repetition")  # of every item, besides its score


class Evaluator:
    """Greedy answers to the last user turn of every held-out conversation, or of `eval.limit` of them.

    A conversation that does not end with an answer is left out and counted under `no_answer`.

    `eval.score` decides what is right; both matches and ROUGE-L are recorded beside it, and what two trivial answers
    would have scored: the prompt itself, and the commonest reference of the category. Results are broken down by
    `eval.by`, by source and by `eval.groups`. Items that share a value of `data.held_out_by` form a cluster (a task).
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.checker = find_checker(config.eval.score)

    def run(self, model: Any, params: Any, tokenizer: Any, dataset: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(summary, items): an item has prompt, messages, reference, answer, score, exact, normalized, rouge_l,
        stopped, tokens, repetition, category, cluster, source, groups, address and metadata.
        """
        settings = self.config.eval
        questions = [each for each in dataset.held_out_conversations if _is_question(each)]
        no_answer = len(dataset.held_out_conversations) - len(questions)
        chosen = self._choose(questions)
        items = [describe(conversation, self.config, number) for number, conversation in enumerate(chosen)]
        answers = answer_all(model, params, tokenizer, chosen, self.config)
        too_long = sum(answer is None for answer in answers)
        found = []
        for item, answer in zip(items, answers, strict=True):
            if answer is None:
                continue
            text = tokenizer.decode(answer.ids)
            matches = {"exact": exact(item, text), "normalized": normalized(item, text),
                       "rouge_l": rouge.score(item, text)}  # fmt: skip
            ended = {"stopped": answer.stopped, "tokens": len(answer.ids), "repetition": repetition(answer.ids)}
            found.append({**item, "answer": text, "score": self._score(item, text), **matches, **ended})
        summary = {**summarise(found), "score_by": settings.score, "max_new_tokens": settings.max_new_tokens,
                   "too_long": too_long, "no_answer": no_answer}  # fmt: skip
        parts = broken_down(found, lambda places: summarise([found[place] for place in places]))
        return {**summary, "baselines": self._baselines(found), **parts}, found

    def _choose(self, conversations: list[Conversation]) -> list[Conversation]:
        """All, or `eval.limit` of them: the same ones in every evaluation of the same data and seed."""
        limit = self.config.eval.limit
        if not limit or limit >= len(conversations):
            return list(conversations)
        order = np.random.default_rng(self.config.seed).permutation(len(conversations))
        return [conversations[i] for i in np.sort(order[:limit])]

    def _score(self, item: dict[str, Any], answer: str) -> bool | float:
        name = self.config.eval.score
        try:
            value = self.checker(item, answer)
        except Exception as error:  # the checker is the user's code: say on which item it failed
            kind = type(error).__name__
            raise RunError(f"eval.score: {name} failed on {item['address']} with {kind}: {error}") from error
        if isinstance(value, int | float | np.number) and not isinstance(value, bool):
            if not 0 <= value <= 1:
                raise RunError(f"eval.score: {name} gave {value} on {item['address']}; expected a score from 0 to 1")
            return float(value)
        return bool(value)

    def _baselines(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        """What answers without any thought score: the prompt, and the commonest reference of the item's category.

        The latter is taken from the held-out references themselves: no model may know them, so it is an upper bound.
        """
        commonest = {
            category: Counter(item["reference"] for item in items if item["category"] == category).most_common(1)[0][0]
            for category in {item["category"] for item in items}
        }
        answers = {"copy": lambda item: item["prompt"], "majority": lambda item: commonest[item["category"]]}
        return {
            name: rate([self._score(item, answer(item)) for item in items]) if items else {}
            for name, answer in answers.items()
        }


def answer_all(model: Any, params: Any, tokenizer: Any, conversations: Sequence[Any], config: Config) -> list[Any]:
    """A greedy `Generated` for each conversation; None where its prompt leaves no room in the model's context."""
    from itune.data.render import render_prompt

    prompts = [render_prompt(conversation, tokenizer) for conversation in conversations]
    fits = [place for place, prompt in enumerate(prompts) if len(prompt) < model.config.max_length]
    answers: list[Any] = [None] * len(prompts)
    generated = generate_ids(
        model, params, [prompts[place] for place in fits], max_new_tokens=config.eval.max_new_tokens,
        stop_ids=tokenizer.stop_ids, batch_size=config.eval.batch_size,
    )
    for place, answer in zip(fits, generated, strict=True):
        answers[place] = answer
    return answers


def ask(model: Any, params: Any, tokenizer: Any, questions: Sequence[str], config: Config, source: str
        ) -> list[dict[str, Any] | None]:  # fmt: skip
    """Items of an evaluator's own questions: address, source, prompt, answer, stopped, tokens, repetition; None where a
    question leaves no room in the model's context.
    """
    rows = [Conversation((Message("user", text),), Address(source, "", at)) for at, text in enumerate(questions, 1)]
    items: list[dict[str, Any] | None] = []
    for row, answer in zip(rows, answer_all(model, params, tokenizer, rows, config), strict=True):
        items.append(None if answer is None else {
            "address": str(row.address), "source": source, "prompt": row.messages[0].content,
            "answer": tokenizer.decode(answer.ids), "stopped": answer.stopped, "tokens": len(answer.ids),
            "repetition": repetition(answer.ids),
        })  # fmt: skip
    return items


def describe(conversation: Conversation, config: Config, number: int) -> dict[str, Any]:
    """What a checker and a reader know of an item: the messages that are asked, and as reference the final answer."""
    messages = _asked(conversation)
    reference = conversation.messages[-1].content if len(messages) < len(conversation.messages) else ""
    return {
        **labels(conversation, config, number),
        "prompt": next((m.content for m in reversed(messages) if m.role == "user"), ""),
        "messages": [{"role": m.role, "content": m.content} for m in messages],
        "reference": reference,
        "metadata": dict(conversation.metadata),
    }


def _asked(conversation: Conversation) -> list[Message]:
    """The messages before the assistant's last turns, as `render_prompt` takes them."""
    messages = list(conversation.messages)
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return messages


def _is_question(conversation: Conversation) -> bool:
    """It ends with an answer of the assistant, and something is asked before."""
    return 0 < len(_asked(conversation)) < len(conversation.messages)


def repetition(ids: Sequence[int] | np.ndarray, length: int = 4) -> float:
    """Share of an answer's runs of four tokens that have stood in it before: 0 in most prose, near 1 in a loop."""
    runs = [tuple(ids[at : at + length]) for at in range(len(ids) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def rate(scores: Sequence[float]) -> dict[str, Any]:
    """n, score and its 95 % interval: by Wilson where every score is right or wrong, else by bootstrap."""
    score, low, high = stats.interval(scores)
    return {"n": len(scores), "score": score, "low": low, "high": high}


def summarise(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rates with 95 % intervals, NAME_low and NAME_high; those of the score also over clusters, by bootstrap."""
    n = len(items)
    if n == 0:
        return {"n": 0}
    scores = [item["score"] for item in items]
    clusters = [item["cluster"] for item in items]
    _, cluster_low, cluster_high = stats.clustered_mean(scores, clusters)
    summary = {
        **rate(scores),
        "correct": sum(scores),
        "clusters": len(set(clusters)),
        "cluster_low": cluster_low,
        "cluster_high": cluster_high,
    }
    for name in MEASURES:
        if name in items[0]:
            summary |= named(name, stats.interval([item[name] for item in items]))
    return {**summary, "tokens": sum(item["tokens"] for item in items) / n}
