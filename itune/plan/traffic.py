"""Bytes that one device receives from others in a step, by formula and by purpose."""

from __future__ import annotations

from typing import Any

from itune.objectives.losses import visits_vocabulary
from itune.plan.layout import Layout, layer_elements


def formula_traffic(layout: Layout) -> dict[str, float]:
    """Purpose -> bytes; what is 0 is left out. Every micro-batch gathers kernels and sums gradients anew."""
    c, m, sizes = layout.config, layout.model.config, layout.sizes
    fsdp, data, tensor, context = (sizes[axis] for axis in ("fsdp", "data", "tensor", "context"))
    layers, micro = m.num_layers, c.train.accumulation
    kernels = layers * layer_elements(layout.model, tensor, sizes["expert"])[0]
    share = (fsdp - 1) / fsdp
    hidden = layout.tokens * m.width * layout.width_bytes  # of one layer, one micro-batch
    passes = (3 if c.train.remat != "none" else 2) if layout.through else 1
    traffic = {
        "gather weights": micro * (1 + layout.through) * layout.width_bytes * kernels * share,
        "sum gradients over fsdp": micro * 4 * kernels * share * layout.trained_layers,
        "sum gradients over data": micro * 2 * 4 * layout.trained * (data * context - 1) / (data * context),
        "embedding": micro * 3 * hidden * share,
        "head": micro * _head(layout) * share,
        "sum activations over tensor": micro * passes * 2 * layers * 2 * hidden * (tensor - 1) / tensor,
        "sum experts": micro * passes * _expert_layers(m) * 4 * layout.tokens * m.width * _both(sizes["expert"]),
        "gather keys": micro * passes * layers * 2 * layout.tokens * (context - 1) * m.num_kv_heads * m.head_dim
        * layout.width_bytes / tensor,
    }
    return {purpose: size for purpose, size in traffic.items() if size}


def _head(layout: Layout) -> float:
    m, sizes = layout.model.config, layout.sizes
    vocab = m.vocab_size / sizes["tensor"]
    moving = layout.width_bytes + 4
    if visits_vocabulary(sizes, (m.vocab_size, m.width), layout.tokens * sizes["fsdp"]):
        return layout.tokens * sizes["fsdp"] * m.width * moving + vocab / sizes["fsdp"] * m.width * moving
    return vocab * m.width * moving


def _expert_layers(m: Any) -> int:
    return sum(kind.experts is not None for kind in m.kinds)


def _both(devices: int) -> float:
    return 2 * (devices - 1) / devices


def across_slices(layout: Layout) -> float:
    """Of these, the bytes that come from other slices: gradients of copies, and what fsdp gathers and sums there.

    What a slice needs from outside enters it once, divided over its devices.
    """
    data, fsdp, micro = layout.dcn["data"], layout.dcn["fsdp"], layout.config.train.accumulation
    elements = layer_elements(layout.model, layout.sizes["tensor"], layout.sizes["expert"])[0]
    kernels = layout.model.config.num_layers * elements
    copies = micro * 2 * 4 * layout.trained * (data - 1) / data
    moving = 2 * layout.width_bytes + 4 * layout.trained_layers
    return copies + micro * moving * kernels * (fsdp - 1) / layout.sizes["fsdp"]
