"""Cross-entropy and its gradients over the vocabulary in blocks.

The loss normally adds up the kernel's gradient over chunks of tokens: a float32 array as large as the head, beside the
head and its gradient. Here a block of the vocabulary meets all tokens before the next one comes, so only a block's
gradient is in float32. The normaliser must be known first: each logit is computed twice, for 8 T D V floating point
operations instead of 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def cross_entropy_in_blocks(
    logits_fn: Callable[[Any, Any], Any],
    kernel_VD: Any,
    hidden_TD: Any,
    targets_T: Any,
    weights_T: Any,
    *,
    turns: Any,
    chunk: int,
    blocks: int,
    gradient_dtype: Any,
) -> tuple[Any, Any, Any, Any]:
    """(nll_T, correct_T, dkernel_VD, dhidden_TD) of the first `turns` (may be traced) chunks of tokens.

    T must be a multiple of `chunk`; behind the last turn everything is 0. dkernel_VD comes in `gradient_dtype`,
    dhidden_TD in float32. `logits_fn` as for `chunked_cross_entropy`.
    """
    entries = kernel_VD.shape[0]
    block = -(-entries // blocks)

    def piece(array: Any, turn: Any) -> Any:
        return jax.lax.dynamic_slice_in_dim(array, turn * chunk, chunk)

    def store(array: Any, values: Any, turn: Any) -> Any:
        return jax.lax.dynamic_update_slice_in_dim(array, values, turn * chunk, 0)

    def kernel_part(number: Any) -> tuple[Any, Any, Any]:
        """(kernel of a block, its entries, start). The last block begins early; what came before has entry -1."""
        start = jnp.minimum(number * block, entries - block)
        entries_V = start + jnp.arange(block)
        part_VD = jax.lax.dynamic_slice_in_dim(kernel_VD, start, block)
        return part_VD, jnp.where(entries_V >= number * block, entries_V, -1), start

    def statistics(turn: Any, stored: Any) -> Any:
        hidden_CD, targets_C = piece(hidden_TD, turn), piece(targets_T, turn)

        def of_block(number: Any, carry: Any) -> Any:
            highest_C, normaliser_C, target_C = carry
            part_VD, entries_V, _ = kernel_part(number)
            logits_CV = jnp.where(entries_V >= 0, logits_fn(part_VD, hidden_CD), -jnp.inf)
            higher_C = jnp.maximum(highest_C, jnp.max(logits_CV, axis=-1))
            normaliser_C *= jnp.exp(highest_C - higher_C)
            normaliser_C += jnp.sum(jnp.exp(logits_CV - higher_C[:, None]), axis=-1)
            target_C += jnp.sum(jnp.where(entries_V == targets_C[:, None], logits_CV, 0), axis=-1)
            return higher_C, normaliser_C, target_C

        zeros_C = jnp.zeros((chunk,), jnp.float32)
        start = (jnp.full((chunk,), -jnp.inf, jnp.float32), zeros_C, zeros_C)
        highest_C, normaliser_C, target_C = jax.lax.fori_loop(0, blocks, of_block, start)
        log_sum_C = highest_C + jnp.log(normaliser_C)
        found = (log_sum_C, log_sum_C - target_C, (target_C >= highest_C).astype(jnp.float32))
        return tuple(store(array, values, turn) for array, values in zip(stored, found, strict=True))

    zeros_T = jnp.zeros(targets_T.shape, jnp.float32)
    log_sum_T, nll_T, correct_T = jax.lax.fori_loop(0, turns, statistics, (zeros_T, zeros_T, zeros_T))

    def gradients(number: Any, carry: Any) -> Any:
        dkernel_VD, dhidden_TD = carry
        part_VD, entries_V, start = kernel_part(number)

        def of_chunk(turn: Any, carry: Any) -> Any:
            dpart_VD, dhidden_TD = carry
            # as float32 arguments, so that their gradients are not rounded before they are summed
            arguments = part_VD.astype(jnp.float32), piece(hidden_TD, turn).astype(jnp.float32)
            logits_CV, pull = jax.vjp(logits_fn, *arguments)
            softmax_CV = jnp.exp(logits_CV - piece(log_sum_T, turn)[:, None])
            error_CV = softmax_CV - (entries_V == piece(targets_T, turn)[:, None])
            own, dhidden_CD = pull(jnp.where(entries_V >= 0, piece(weights_T, turn)[:, None] * error_CV, 0))
            return dpart_VD + own, store(dhidden_TD, piece(dhidden_TD, turn) + dhidden_CD, turn)

        zeros_VD = jnp.zeros(part_VD.shape, jnp.float32)
        dpart_VD, dhidden_TD = jax.lax.fori_loop(0, turns, of_chunk, (zeros_VD, dhidden_TD))
        before_VD = jax.lax.dynamic_slice_in_dim(dkernel_VD, start, block)  # not 0 where the last block begins early
        dpart_VD = before_VD + dpart_VD.astype(gradient_dtype)
        return jax.lax.dynamic_update_slice_in_dim(dkernel_VD, dpart_VD, start, 0), dhidden_TD

    empty = jnp.zeros(kernel_VD.shape, gradient_dtype), jnp.zeros(hidden_TD.shape, jnp.float32)
    dkernel_VD, dhidden_TD = jax.lax.fori_loop(0, blocks, gradients, empty)
    return nll_T, correct_T, dkernel_VD, dhidden_TD
