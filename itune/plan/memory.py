"""Memory of a train step on one device, by formula: for chips and sizes that nobody compiles for.

The state is exact (its shards are counted). What lives beside it is modelled in three moments of a step, of which the
largest counts: the head, a layer's backward pass, and the update. Constants were set by compiled programs; a test
compares them, for TPUs and for the GPUs of one host (tests/plan/test_big.py). On CPUs experts need more
(`models/groups.py`).
"""

from __future__ import annotations

import dataclasses

from itune.objectives.losses import visits_vocabulary
from itune.plan.layout import Layout, layer_elements

PROGRAM = 60 * 2**20  # the code itself and small buffers


@dataclasses.dataclass(frozen=True)
class Need:
    """Bytes on one device. `activations` are those kept from forward to backward pass; `temporaries` all else, but for
    `attention`: what cuDNN takes beside XLA."""

    parameters: int
    optimizer: int
    gradients: int
    activations: int
    temporaries: int
    attention: int = 0

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))


def formula_memory(layout: Layout, attention: int = 0) -> Need:
    """What one device needs for the train step; `attention`: see `itune.plan.gpu_target.cudnn_formula`."""
    c = layout.config
    gradients = 4 * layout.trained
    kept = c.train.remat
    activations = int(layout.model.config.num_layers * layout.tokens * kept_per_token(layout, kept) * layout.through)
    held = gradients if c.train.accumulation > 1 else 0  # the sum over micro-batches lives through all of them
    layer_moment = gradients + activations + layer_bytes(layout)
    head_moment = activations + head_bytes(layout)
    peak = max(held + layer_moment, held + head_moment, gradients)
    shown = gradients + held if held else gradients
    temporaries = max(peak - shown - activations, 0) + PROGRAM
    return Need(layout.parameters, layout.optimizer, shown, activations, temporaries, attention)


def kept_per_token(layout: Layout, remat: str) -> float:
    """Bytes a token and layer that wait for the backward pass."""
    m, t = layout.model.config, layout.sizes["tensor"]
    if remat == "full":
        return layout.width_bytes * m.width
    mlp, heads = _mlp_width(layout), m.num_heads * m.head_dim / t
    projected = (m.num_heads + 2 * m.num_kv_heads) * m.head_dim / t
    statistics = 4 * m.num_heads / t  # of attention's softmax
    routed = _routed_width(layout)
    # a norm keeps what it reads: after the MLP, what the MLP gave
    read = {"pre": (2, 4), "post": (3, 4), "both": (3, 6)}[m.norm_placement]
    if remat == "dots":  # layer input, what every product gives, and attention
        kept = read[0] * m.width + heads + projected + 2 * mlp + routed
        return layout.width_bytes * kept + statistics
    normed = projected - m.num_kv_heads * m.head_dim / t if m.qk_norm else 0  # before the norms of query and key
    # both residuals, what the norms read and gave, what attention reads and gives, gate and up and their product, a
    # token for each expert that it chose, and what that expert gave in float32
    kept = read[1] * m.width + heads + projected + normed + 3 * mlp + routed
    return layout.width_bytes * kept + 4 * routed + statistics


def layer_bytes(layout: Layout) -> int:
    """What one layer's backward pass holds: gathered kernels, their gradients, recomputed activations, cotangents."""
    m, t = layout.model.config, layout.sizes["tensor"]
    _, largest = layer_elements(layout.model, t, layout.sizes["expert"])
    gathered = layout.width_bytes * largest * 3 if layout.sizes["fsdp"] > 1 else layout.width_bytes * largest
    gradient = 4 * largest if layout.trained_layers > 0.01 else 0  # of norms alone: nothing
    widths = 8 * m.width + 5 * _mlp_width(layout) + 4 * m.num_heads * m.head_dim / t
    routed = (4 + 2 * layout.width_bytes) * _routed_width(layout)  # what goes to the experts, and comes back in float32
    return int(gathered + gradient + layout.tokens * (layout.width_bytes * widths + routed))


def head_bytes(layout: Layout) -> int:
    """What the loss holds: logits of a chunk with their softmax, the kernel where it is whole, gradients."""
    m, sizes = layout.model.config, layout.sizes
    fsdp, t = sizes["fsdp"], sizes["tensor"]
    vocab, chunk = m.vocab_size / t, min(layout.config.loss.chunk, layout.tokens)
    blocks = layout.config.loss.blocks
    logits = chunk * vocab * 2 * layout.width_bytes / blocks  # and their gradient
    hidden = 2 * layout.tokens * m.width * layout.width_bytes
    kernel_gradient = int(layout.head_trains)
    if fsdp > 1 and visits_vocabulary(sizes, (m.vocab_size, m.width), layout.tokens * fsdp):
        part = vocab / fsdp * m.width
        visitors = fsdp * chunk * m.width * (4 + layout.width_bytes)
        return int(logits + hidden + part * (8 * kernel_gradient + layout.width_bytes) + visitors)
    whole = layout.width_bytes + kernel_gradient * (4 if fsdp > 1 else 4 + 4 / blocks)
    return int(logits + hidden + vocab * m.width * whole)


def _mlp_width(layout: Layout) -> float:
    """Width of what stands between a layer's MLP kernels, a token, on one device."""
    m, t = layout.model.config, layout.sizes["tensor"]
    widths = [m.mlp_width if kind.experts is None else kind.experts.chosen * kind.experts.width for kind in m.kinds]
    return sum(widths) / len(widths) / t


def _routed_width(layout: Layout) -> float:
    """The model's width once for each expert that a token chose, of an average layer."""
    m = layout.model.config
    return m.width * sum(kind.experts.chosen for kind in m.kinds if kind.experts) / len(m.kinds)
