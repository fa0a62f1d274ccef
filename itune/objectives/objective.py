"""What every objective gives to the step builder: sums to minimise, and losses by token to evaluate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from itune.types import Batch

LossFn = Callable[[Any, Any, Batch, Any], tuple[Any, Any, dict[str, Any]]]
TokenFn = Callable[[Any, Any, Batch], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """`objective(trainable, frozen, batch, rng) -> (loss_sum, weight_sum, metrics)`: float32 sums, never means.

    A step minimises sum(loss_sum) / sum(weight_sum), both over every micro-batch of the global batch; with `divide`
    False it minimises sum(loss_sum). `metrics` holds further sums, `correct` among them: supervised tokens predicted
    right. `per_token(trainable, frozen, batch) -> (nll_BL, correct_BL)` serves evaluation: float32, 0 where the weight
    is 0.
    """

    loss: LossFn
    per_token: TokenFn
    divide: bool = True

    def __call__(self, trainable: Any, frozen: Any, batch: Batch, rng: Any) -> tuple[Any, Any, dict[str, Any]]:
        return self.loss(trainable, frozen, batch, rng)
