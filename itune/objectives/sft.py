"""Supervised fine-tuning: the weighted negative log-likelihood of the target tokens, under four ways to weight it."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from itune.objectives.losses import CrossEntropy, check_blocks, chunked_cross_entropy
from itune.objectives.objective import Objective
from itune.types import Batch, InputError

WEIGHTINGS = ("token", "example", "microbatch_mean", "sum")


def full_parameters(trainable: Any, frozen: Any) -> Any:
    """The model's parameters when all of them train."""
    return trainable


def make_sft(
    model: Any,
    weighting: str = "token",
    chunk: int = 1024,
    *,
    blocks: int = 1,
    parameters: Callable[[Any, Any], Any] = full_parameters,
    router_aux: float = 0.0,
) -> Objective:
    """The objective of supervised fine-tuning for `model`. Its step minimises, over the global batch:

    token: sum(w * nll) / sum(w). example: the mean over examples of each one's weighted mean.
    microbatch_mean: the mean over micro-batches (those that carry weight) of each one's weighted mean, as trainers did
    before they counted tokens globally; it depends on `train.accumulation`. sum: sum(w * nll), divided by nothing.

    `chunk`: tokens whose logits exist at one time on each device; `blocks`: parts of the vocabulary in which they do
    (above 1 for one device only: less memory, a third more products of the head). `parameters(trainable, frozen)`: what
    the model reads. `router_aux` times the load-balancing loss of the routers joins what is minimised: each
    micro-batch's own, their mean by weight. Raises InputError for an unknown weighting, for `router_aux` on a
    model without experts, and for `blocks` on several devices.
    """
    if weighting not in WEIGHTINGS:
        near = difflib.get_close_matches(weighting, WEIGHTINGS, n=1)
        hint = f" (nearest: {near[0]})" if near else ""
        raise InputError(f"config: loss.weighting must be one of {', '.join(WEIGHTINGS)}, found {weighting!r}{hint}")
    check_blocks(blocks, model.mesh)
    divide = weighting != "sum"
    if router_aux and all(kind.experts is None for kind in model.config.kinds):
        raise InputError(f"config: loss.router_aux={router_aux} needs a mixture of experts, and this model has none; "
                         "set it to 0")

    def cross_entropy(params: Any, hidden_BLD: Any, batch: Batch, weights_BL: Any) -> CrossEntropy:
        return chunked_cross_entropy(
            model.head_logits, model.unembed(params), hidden_BLD, batch.targets_BL, weights_BL, chunk=chunk,
            blocks=blocks, mesh=model.mesh,
        )

    def hidden(params: Any, batch: Batch, rng: Any) -> Any:
        return model.hidden(params, batch.tokens_BL, batch.segment_ids_BL, batch.positions_BL, rng=rng)

    def loss(trainable: Any, frozen: Any, batch: Batch, rng: Any) -> tuple[Any, Any, dict[str, Any]]:
        weights_BL, weight_sum = batch.loss_weights_BL, jnp.sum(batch.loss_weights_BL)
        if weighting == "example":
            weights_BL, weight_sum = example_weights(weights_BL, batch.segment_ids_BL)
        if weighting == "microbatch_mean":
            weights_BL = weights_BL / jnp.where(weight_sum > 0, weight_sum, 1)
            weight_sum = (weight_sum > 0).astype(jnp.float32)
        params = parameters(trainable, frozen)
        if not router_aux:
            result = cross_entropy(params, hidden(params, batch, rng), batch, weights_BL)
            return result.loss_sum, weight_sum, {"correct": jnp.sum(result.correct)}
        hidden_BLD, balance = model.hidden_and_balance(
            params, batch.tokens_BL, batch.segment_ids_BL, batch.positions_BL, rng=rng
        )
        result = cross_entropy(params, hidden_BLD, batch, weights_BL)
        balance *= jax.lax.stop_gradient(weight_sum) if divide else 1
        metrics = {"correct": jnp.sum(result.correct), "router_aux": balance}
        return result.loss_sum + router_aux * balance, weight_sum, metrics

    def per_token(trainable: Any, frozen: Any, batch: Batch) -> tuple[Any, Any]:
        params = parameters(trainable, frozen)
        result = cross_entropy(params, hidden(params, batch, None), batch, batch.loss_weights_BL)
        return result.nll, result.correct

    return Objective(loss, per_token, divide)


def by_micro_batch(weighting: str, router_aux: float) -> str:
    """The setting by which what is minimised depends on `train.accumulation`, by definition; "" where none does."""
    if weighting == "microbatch_mean":
        return "loss.weighting=microbatch_mean"
    return f"loss.router_aux={router_aux}" if router_aux else ""


def example_weights(weights_BL: Any, segment_ids_BL: Any) -> tuple[Any, Any]:
    """Weights that sum to 1 over each example (each segment of a row), and the number of examples that carry weight.

    Segment ids must lie in 0..L. An example whose weights are all 0 stays at 0 and is not counted.
    """
    def one_row(weights_L: Any, segments_L: Any) -> tuple[Any, Any]:
        sums_S = jax.ops.segment_sum(weights_L, segments_L, num_segments=segments_L.shape[0] + 1)
        total_L = sums_S[segments_L]
        return weights_L / jnp.where(total_L > 0, total_L, 1), jnp.sum(sums_S > 0)

    scaled_BL, counts_B = jax.vmap(one_row)(weights_BL, segment_ids_BL)
    return scaled_BL, jnp.sum(counts_B).astype(jnp.float32)
