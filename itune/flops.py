"""Floating-point operations of a training step by formula, and what devices can do at most.

N_mat counts the entries of every matrix that multiplies activations: layers and head, not the embedding lookup. A token
costs 2 N_mat forward; a (query, key) pair costs 4 N H in every layer (scores and weighted values). The backward pass
costs twice the forward pass. Recomputation is not counted: this is work the model needs, not work the hardware did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

# peak bfloat16 FLOP/s of one device, dense; the first name that the device's kind contains decides
PEAKS: tuple[tuple[str, float], ...] = (
    ("H200", 989.4e12),
    ("H100", 989.4e12),
    ("A100", 312e12),
    ("TPU v6", 920e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v4", 275e12),
)


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of a device by `jax.Device.device_kind`; None when it is not known (CPU)."""
    return next((peak for name, peak in PEAKS if name.lower() in device_kind.lower()), None)


def matrix_parameters(config: Any) -> int:
    """N_mat of a ModelConfig: of the experts of a layer, those that a token chooses, and the router."""
    attention = config.width * config.head_dim * (2 * config.num_heads + 2 * config.num_kv_heads)
    dense = 3 * config.width * config.mlp_width
    layers = sum(
        attention + (dense if e is None else config.width * e.count) for e in (kind.experts for kind in config.kinds)
    )
    return layers + expert_parameters(config) + config.width * config.vocab_size


def expert_parameters(config: Any) -> int:
    """The part of N_mat that the experts of all layers hold: of a layer's experts, those that a token chooses."""
    return sum(3 * config.width * e.chosen * e.width for e in (kind.experts for kind in config.kinds) if e)


def windows(config: Any) -> tuple[int | None, ...]:
    """The attention window of each layer in tokens; None sees everything before it."""
    return tuple(kind.window for kind in config.kinds)


def visible_pairs(positions_BL: np.ndarray, segment_ids_BL: np.ndarray, window: int | None = None) -> int:
    """Causal (query, key) pairs within segments, padding left out: packed lengths are counted as they are."""
    seen_BL = positions_BL.astype(np.int64) + 1
    if window is not None:
        seen_BL = np.minimum(seen_BL, window)
    return int(seen_BL[segment_ids_BL > 0].sum())


def batch_pairs(config: Any, batch: Any) -> dict[int | None, int]:
    """Window -> visible pairs of a host batch, for each window that the model's layers have."""
    return {w: visible_pairs(batch.positions_BL, batch.segment_ids_BL, w) for w in dict.fromkeys(windows(config))}


def forward_flops(config: Any, tokens: int, pairs: Mapping[int | None, float]) -> float:
    """FLOPs of one forward pass over `tokens` real tokens with `pairs` visible pairs by window."""
    attention = sum(4.0 * config.num_heads * config.head_dim * pairs[window] for window in windows(config))
    return 2.0 * matrix_parameters(config) * tokens + attention


def train_flops(config: Any, tokens: int, pairs: Mapping[int | None, float]) -> float:
    """FLOPs of forward and backward, all parameters trained."""
    return 3.0 * forward_flops(config, tokens, pairs)


def partial_train_flops(
    config: Any, tokens: int, pairs: Mapping[int | None, float], trained: float, added: float = 0.0,
    through: bool = True,
) -> float:
    """FLOPs of forward and backward where only some matrices train: no gradient of the others is formed.

    trained: entries of the matrices that train, of experts those that a token chooses. added: entries of adapters
    among them, which N_mat does not count. through: whether gradients go back through the layers: not where nothing
    trains but the head and the norm before it.
    """
    whole = matrix_parameters(config)
    if not through:
        return forward_flops(config, tokens, pairs) + 2.0 * (config.width * config.vocab_size + trained) * tokens
    attention = forward_flops(config, tokens, pairs) - 2.0 * whole * tokens
    return 3.0 * attention + (4.0 * (whole + added) + 2.0 * trained) * tokens
