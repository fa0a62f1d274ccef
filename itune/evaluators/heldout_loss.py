"""Loss of the held-out answers: sum(w * nll) / sum(w), overall and by category."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from itune.config import Config
from itune.data.loader import eval_batches
from itune.evaluators import stats
from itune.evaluators.labels import broken_down, labels
from itune.evaluators.paired import named
from itune.objectives.sft import make_sft
from itune.sharding import make_mesh, rows_divisor
from itune.step import make_eval_step


class Evaluator:
    """Token-weighted negative log-likelihood, perplexity, and the share of supervised tokens predicted right.

    Sums over all held-out examples, never means of batches: `eval.batch_size` and the mesh do not change it. Results
    are broken down by `eval.by`, by source and by `eval.groups`.
    """

    def __init__(self, config: Config) -> None:
        self.config = config

    def run(self, model: Any, params: Any, tokenizer: Any, dataset: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(summary, items): loss in nats a token, its weight, accuracy of the supervised tokens and their number."""
        del tokenizer
        store, c = dataset.held_out, self.config
        sums = np.zeros((4, len(store) + 1))  # loss, weight, correct, tokens; the last column takes padding
        for weights_BL, nll_BL, correct_BL, index in token_losses(c, model, params, store):
            parts = (weights_BL * nll_BL, weights_BL, correct_BL, weights_BL > 0)
            for total, part in zip(sums, parts, strict=True):
                total += np.bincount(index, weights=part.ravel(), minlength=len(total))
        sums = sums[:, :-1]
        examples = [store[i] for i in range(len(store))]
        items = []
        for place, example in enumerate(examples):
            found = summarise(sums[:, place : place + 1])
            items.append({**labels(example, c, place), **{name: found[name] for name in PER_ITEM}})

        def of(places: list[int]) -> dict[str, Any]:
            return summarise(sums[:, places], [items[place]["cluster"] for place in places])

        return {**of(list(range(len(items)))), **broken_down(items, of)}, items


def token_losses(
    config: Config, model: Any, params: Any, store: Any
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
    """(weights_BL, nll_BL, correct_BL, index) of every batch of a store, float64; nll is 0 where the weight is.

    `index` [B * L] is the example of each position, len(store) for padding.
    """
    mesh = mesh_of(model)
    rows = -(-config.eval.batch_size // rows_divisor(mesh)) * rows_divisor(mesh)
    batches = eval_batches(store, rows, config.data.max_length)
    step = token_step(dataclasses.replace(model, max_segments=batches.max_segments), config.loss.chunk)
    for number in range(len(batches)):
        batch = batches[number]
        nll_BL, correct_BL = (np.asarray(x, np.float64) for x in step(params, {}, batch))
        index = batches.example_index_BL(number).ravel() % (len(store) + 1)
        yield batch.loss_weights_BL.astype(np.float64), nll_BL, correct_BL, index


PER_ITEM = ("loss", "perplexity", "accuracy", "weight", "tokens")


def summarise(sums: np.ndarray, clusters: Sequence[str] = ("",)) -> dict[str, Any]:
    """Rates of the examples whose (loss, weight, correct, tokens) are the columns of `sums`.

    With the example's clusters (tasks) also the 95 % intervals of loss and accuracy, by a bootstrap over clusters; a
    bound that one cluster cannot tell is None.
    """
    loss_sum, weight, correct, tokens = sums.sum(axis=1)
    loss = loss_sum / weight if weight else 0.0
    numbers = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),  # e^709 is the largest that a float holds
        "accuracy": correct / tokens if tokens else 0.0,
        "weight": weight,
        "tokens": int(tokens),
        "examples": sums.shape[1],
    }
    if len(clusters) == sums.shape[1] and sums.shape[1] > 1:
        numbers |= named("loss", stats.ratio(sums[0], sums[1], clusters))
        numbers |= named("accuracy", stats.ratio(sums[2], sums[3], clusters, 0.0, 1.0))
        numbers["clusters"] = len(set(clusters))
    return numbers


def mesh_of(model: Any) -> Any:
    return model.mesh if model.mesh is not None else make_mesh({}, jax.devices()[:1])


@functools.lru_cache(maxsize=4)
def token_step(model: Any, chunk: int) -> Any:
    """The evaluation step, compiled once for a model and reused by every later evaluation."""
    return make_eval_step(make_sft(model, "token", chunk), mesh_of(model))
