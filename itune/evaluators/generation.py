"""Answers to held-out instructions, scored against the reference or by a checker."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from itune.config import Config
from itune.decode import generate_ids
from itune.evaluators import stats
from itune.evaluators.scoring import exact, find_checker, normalized
from itune.types import Conversation, RunError


class Evaluator:
    """Greedy answers to the last user turn of every held-out conversation, or of `eval.limit` of them.

    `eval.score` decides what is right; both matches are recorded beside it. Results are broken down by the metadata
    field `eval.by`. Items that share a value of `data.held_out_by` form a cluster (a task).
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.checker = find_checker(config.eval.score)

    def run(self, model: Any, params: Any, tokenizer: Any, dataset: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(summary, items): an item has prompt, messages, reference, answer, score, exact, normalized, stopped, tokens,
        category, cluster, address and metadata.
        """
        from itune.data.render import render_prompt

        settings = self.config.eval
        chosen = self._choose(dataset.held_out_conversations)
        prompts = [render_prompt(conversation, tokenizer) for conversation in chosen]
        fits = [len(prompt) < model.config.max_length for prompt in prompts]
        chosen = [conversation for conversation, fit in zip(chosen, fits, strict=True) if fit]
        prompts = [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit]
        answers = generate_ids(
            model, params, prompts, max_new_tokens=settings.max_new_tokens, stop_ids=tokenizer.stop_ids,
            batch_size=settings.batch_size,
        )
        items = []
        for number, (conversation, answer) in enumerate(zip(chosen, answers, strict=True)):
            item = describe(conversation, settings.by, self.config.data.held_out_by, number)
            text = tokenizer.decode(answer.ids)
            matches = {"exact": exact(item, text), "normalized": normalized(item, text)}
            ended = {"stopped": answer.stopped, "tokens": len(answer.ids)}
            items.append({**item, "answer": text, "score": self._score(item, text), **matches, **ended})
        summary = {**summarise(items), "score_by": settings.score, "too_long": fits.count(False)}
        groups = defaultdict(list)
        for item in items:
            groups[item["category"]].append(item)
        return {**summary, "categories": {name: summarise(groups[name]) for name in sorted(groups)}}, items

    def _choose(self, conversations: list[Conversation]) -> list[Conversation]:
        """All, or `eval.limit` of them: the same ones in every evaluation of the same data and seed."""
        limit = self.config.eval.limit
        if not limit or limit >= len(conversations):
            return list(conversations)
        order = np.random.default_rng(self.config.seed).permutation(len(conversations))
        return [conversations[i] for i in np.sort(order[:limit])]

    def _score(self, item: dict[str, Any], answer: str) -> bool:
        try:
            return bool(self.checker(item, answer))
        except Exception as error:  # the checker is the user's code: say on which item it failed
            name, kind = self.config.eval.score, type(error).__name__
            raise RunError(f"eval.score: {name} failed on {item['address']} with {kind}: {error}") from error


def describe(conversation: Conversation, category_field: str, cluster_field: str, number: int) -> dict[str, Any]:
    """What a checker and a reader know of an item; the final assistant turn is the reference, not the prompt."""
    messages = list(conversation.messages)
    reference = messages.pop().content if messages[-1].role == "assistant" else ""
    metadata = dict(conversation.metadata)
    return {
        "address": str(conversation.address),
        "prompt": next((m.content for m in reversed(messages) if m.role == "user"), ""),
        "messages": [{"role": m.role, "content": m.content} for m in messages],
        "reference": reference,
        "category": str(metadata.get(category_field, "unknown")),
        "cluster": str(metadata[cluster_field]) if cluster_field in metadata else f"item {number}",
        "metadata": metadata,
    }


def summarise(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates with 95 % intervals: low and high by Wilson, cluster_low and cluster_high by a bootstrap over clusters."""
    n = len(items)
    if n == 0:
        return {"n": 0}
    correct = sum(item["score"] for item in items)
    low, high = stats.wilson(correct, n)
    clusters = [item["cluster"] for item in items]
    _, cluster_low, cluster_high = stats.clustered_mean([item["score"] for item in items], clusters)
    return {
        "n": n,
        "correct": correct,
        "score": correct / n,
        "low": low,
        "high": high,
        "clusters": len(set(clusters)),
        "cluster_low": cluster_low,
        "cluster_high": cluster_high,
        **{key: sum(item[key] for item in items) / n for key in ("exact", "normalized", "stopped", "tokens")},
    }
