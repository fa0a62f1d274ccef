"""Rematerialisation: which activations of a layer wait for its backward pass, and which are computed again."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "itune_kept"


def keep(x: jax.Array) -> jax.Array:
    """Mark what `dots` keeps: what a projection gives, its adapter and bias added, and what attention gives on TPU and
    CPU."""
    return checkpoint_name(x, KEPT)


def keep_products(primitive: Any, *inputs: Any, **params: Any) -> Any:
    """Keep what is marked and what cuDNN's attention puts out, whose second forward pass is spared so.

    XLA's attention and the Triton kernel run forward again: their backward passes need more than their output.
    """
    return primitive.name.startswith("dot_product_attention_fwd") or _MARKED(primitive, *inputs, **params)


_MARKED: Any = jax.checkpoint_policies.save_only_these_names(KEPT)
POLICIES = {"full": None, "dots": keep_products}


def remat(layer_class: Any, policy: str, inside_scan: bool) -> Any:
    """The layer with its activations recomputed in the backward pass: none | full | dots (projections are kept)."""
    if policy == "none":
        return layer_class
    return nn.remat(layer_class, policy=POLICIES[policy], prevent_cse=not inside_scan)
