"""The words of the house: what travels between modules, and the two errors that a user sees.

Shapes ride on names. B batch rows, L length, D model width, N query heads, K key/value heads, H head width,
F MLP width, E experts, V vocabulary, S keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np


class InputError(Exception):
    """What the user gave is wrong: says where, what was found, what was expected, the nearest choice. Exit code 2."""


class RunError(Exception):
    """The run itself failed (out of disk, non-finite loss, a failed proof). Exit code 1."""


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a row came from: the source's name in the config, the file, and the line counted from 1."""

    source: str
    file: str = ""
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file or self.source}:{self.line}" if self.line else (self.file or self.source)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn. `weight` None means the default of its role: 1 for the assistant, 0 otherwise.

    `extra` holds what a chat template may read besides role and content (tool_calls, reasoning_content, name).
    """

    role: str
    content: str
    weight: float | None = None
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Conversation:
    """Messages, the address they came from, and metadata (task, category, annotator, source, tools)."""

    messages: tuple[Message, ...]
    address: Address = Address("memory")
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Example:
    """A rendered conversation: `token_ids[n]` int32, `loss_weights[n]` float32 (weight 0 is context)."""

    token_ids: np.ndarray
    loss_weights: np.ndarray
    address: Address = Address("memory")
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class Batch(NamedTuple):
    """One global batch; the shift is already done: `targets_BL[b, l]` is what follows `tokens_BL[b, l]`.

    tokens_BL, targets_BL, segment_ids_BL (0 is padding), positions_BL: int32. loss_weights_BL: float32, the weight of
    predicting `targets_BL`.
    """

    tokens_BL: Any
    targets_BL: Any
    loss_weights_BL: Any
    segment_ids_BL: Any
    positions_BL: Any


class TrainState(NamedTuple):
    """Everything a step reads and writes. A pytree of arrays and nothing else.

    `trainable` is what the optimizer updates, `frozen` what the model also needs (empty for full tuning).
    """

    step: Any
    trainable: Any
    frozen: Any
    opt_state: Any
    rng: Any

    def replace(self, **changes: Any) -> TrainState:
        """A copy with some fields changed."""
        return self._replace(**changes)
