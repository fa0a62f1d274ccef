"""Load of experts: what layers count of it, and the auxiliary loss that evens it out."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

BALANCE = "balance"  # the collection in which layers leave the sums of `balance_loss`, when somebody asks for it


def balance_sums(logits_BLE: jax.Array, chosen_BLC: jax.Array, segments_BL: jax.Array) -> dict[str, jax.Array]:
    """Sums over the tokens of one layer, padding left out: how often each expert was chosen (E,), router probabilities
    (E,) and tokens (), all float32."""
    on_BL1 = (segments_BL > 0).astype(jnp.float32)[..., None]
    # one slot of the choice at a time: (B, L, C, E) at once would be larger than the hidden states
    chosen_E = sum(
        jnp.sum(on_BL1 * jax.nn.one_hot(chosen_BLC[..., slot], logits_BLE.shape[-1]), (0, 1))
        for slot in range(chosen_BLC.shape[-1])
    )
    probabilities_E = jnp.sum(on_BL1 * jax.nn.softmax(logits_BLE, axis=-1), (0, 1))
    return {"chosen": jnp.asarray(chosen_E), "probabilities": probabilities_E, "tokens": jnp.sum(on_BL1)}


def balance_loss(collected: Any) -> jax.Array:
    """The auxiliary loss that evens out the load of experts: E * sum over experts of share chosen * mean probability.

    Both are means over the tokens of all layers together (Switch Transformer, arXiv 2101.03961, equations 4 to 6, and
    transformers' `load_balancing_loss_func`). `collected`: the sums that the layers left in `BALANCE`, stacked or not.
    """
    totals: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(collected):
        name = path[-1].key
        last = 0 if name == "tokens" else 1
        totals[name] = totals.get(name, 0) + jnp.sum(leaf, tuple(range(leaf.ndim - last)))
    tokens = jnp.maximum(totals["tokens"], 1)
    experts = totals["chosen"].shape[0]
    return experts * jnp.sum((totals["chosen"] / tokens) * (totals["probabilities"] / tokens))
