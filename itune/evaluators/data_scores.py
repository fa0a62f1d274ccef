"""How suspicious each training example looks to the model that is being tuned: a ranked list to review.

A defect is an answer that the tuned model still does not expect. Two signs, both from `itune data score`:

ratio  loss of the answer after its question over its loss alone (the instruction-following difficulty of Li et al.
       2023): near or above 1, the question does not help
min_p  the probability of the least likely token: one wrong word in an answer that is right otherwise

Of a model that was never tuned neither tells anything (measured: docs/data_quality.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from itune.config import Config
from itune.data.encode import encode_many
from itune.data.provenance import located
from itune.data.render import as_conversation, as_tokenizer, render_prompt
from itune.data.store import ExampleStore, memory_store
from itune.data.templates import TemplateRefusal, require_template
from itune.evaluators.heldout_loss import token_losses
from itune.types import Example, InputError


class Evaluator:
    """Scores the training examples, batched and sharded like the held-out loss; the most suspicious come first.

    All of them, or `eval.limit` drawn by the seed.
    """

    needs_held_out = False
    needs_data = True

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, model: Any, params: Any, tokenizer: Any, dataset: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(summary, items): an item has address, source, suspicion (0 to 1), loss, alone (the loss without the
        question), ratio, min_p and supervised tokens. Losses are in nats a token."""
        store, limit = dataset.train, self.config.eval.limit
        if limit and limit < len(store):
            drawn = np.random.default_rng(self.config.seed).permutation(len(store))[:limit]
            store = memory_store([store[i] for i in np.sort(drawn).tolist()])
        loss, lowest, tokens = example_losses(self.config, model, params, store)
        pieces, owner = answers_alone(store, header_length(tokenizer))
        piece_loss, _, piece_tokens = example_losses(self.config, model, params, pieces)
        weighted = np.bincount(owner, weights=piece_loss * piece_tokens, minlength=len(store))
        alone = weighted / np.maximum(np.bincount(owner, weights=piece_tokens, minlength=len(store)), 1)
        ratio = loss / np.maximum(alone, 1e-6)
        suspicion = suspicions(ratio, lowest)
        items = [
            {"address": str(store.address(i)), "source": store.address(i).source, "suspicion": float(suspicion[i]),
             "loss": float(loss[i]), "alone": float(alone[i]), "ratio": float(ratio[i]), "min_p": float(lowest[i]),
             "tokens": int(tokens[i])}
            for i in np.argsort(-suspicion, kind="stable").tolist()
        ]  # fmt: skip
        whole = max(1.0, float(tokens.sum()))
        summary = {"n": len(store), "loss": float(loss @ tokens) / whole, "alone": float(alone @ tokens) / whole,
                   "median_ratio": float(np.median(ratio)), "ratio_above_1": float((ratio > 1).mean())}  # fmt: skip
        return summary, items


def example_losses(config: Config, model: Any, params: Any, store: ExampleStore
                   ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # fmt: skip
    """(mean loss in nats, probability of the least likely token, supervised tokens) of each example; weights above 0
    count alike."""
    sums, highest = np.zeros((2, len(store) + 1)), np.zeros(len(store) + 1)  # the last column takes padding
    for weights_BL, nll_BL, _, index in token_losses(config, model, params, store):
        counted = (weights_BL > 0).ravel()
        nll = np.where(counted, nll_BL.ravel(), 0.0)
        for total, part in zip(sums, (nll, counted), strict=True):
            total += np.bincount(index, weights=part, minlength=len(total))
        np.maximum.at(highest, index, nll)
    losses, tokens = sums[:, :-1]
    return losses / np.maximum(tokens, 1), np.exp(-highest[:-1]), tokens


def answers_alone(store: ExampleStore, header: int) -> tuple[ExampleStore, np.ndarray]:
    """Each answer of each example without what came before it but the template's `header` tokens, and its example."""
    pieces, owner = [], []
    for place in range(len(store)):
        example = store[place]
        for first, last in _runs(example.loss_weights):
            start = max(0, first - header)
            weights = np.where(np.arange(start, last) >= first, example.loss_weights[start:last], 0)
            pieces.append(Example(example.token_ids[start:last], weights.astype(np.float32), example.address))
            owner.append(place)
    return memory_store(pieces), np.asarray(owner, np.int64)


def _runs(weights: np.ndarray) -> Iterator[tuple[int, int]]:
    """[first, last) of each run of tokens with a weight; the first token of all is never a target."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (weights[1:] > 0).astype(np.int8), [0]]))) + 1
    yield from zip(edges[::2].tolist(), edges[1::2].tolist())


def header_length(tokenizer: Any) -> int:
    """Tokens that the template writes before an assistant's answer; at least 1."""
    tokenizer = as_tokenizer(tokenizer)
    question = [{"role": "user", "content": "Where to?"}]
    try:
        bare = encode_many([located(as_conversation(question), require_template(tokenizer))], tokenizer)[0]
        return max(1, len(render_prompt(question, tokenizer)) - len(bare.ids))  # type: ignore[union-attr]
    except (TemplateRefusal, InputError, AttributeError):
        return 1


def suspicions(ratio: np.ndarray, lowest: np.ndarray) -> np.ndarray:
    """0 to 1: the mean of the ranks by ratio (high is suspicious) and by least probability (low is)."""
    return (_ranks(ratio) + _ranks(-lowest)) / 2


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks scaled to 0 (lowest) to 1; equal values share the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2)[place] - 1) / max(1, len(values) - 1)


def average_precision(suspicion: np.ndarray, truth: np.ndarray) -> float:
    """Mean precision at each true defect, down the list; the share of defects is what chance gives."""
    hits = np.asarray(truth, bool)[np.argsort(-np.asarray(suspicion), kind="stable")]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    return float(precision[hits].mean()) if hits.any() else 0.0
