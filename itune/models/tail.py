"""The last layer's MLP as part of the head: computed for the tokens that the loss asks for, and for no others.

After the last attention no token looks at another. The chunked loss leaves out tokens of weight 0 before the head, and
so it can before the MLP that comes ahead of it: where a third of the tokens are targets, two thirds of that work are
saved, forward and backward. On one CPU only: there is room for a copy of the stacked layers without the last one, and
layers are few, so that one of them counts.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from itune.models.architecture import ModelConfig, layer_plan
from itune.models.layers import ADAPTERS, RMSNorm
from itune.models.model import Model, collections
from itune.models.transformer import Layer
from itune.models.unrolled import unroll_params
from itune.sharding import is_one_cpu

CHUNK = 256  # tokens at a time, at most: the last turn is filled up, and each now costs an MLP besides the head
_ATTENTION = ("attention", "attention_norm", "attention_post_norm")


@dataclasses.dataclass(frozen=True)
class Shortened:
    """A model as the loss sees it, whose hidden states end before the last layer's MLP, and whose head begins there.

    Hashable, as the model is.
    """

    model: Model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def mesh(self) -> Any:
        return self.model.mesh

    def hidden(
        self, params: Any, tokens_BL: Any, segment_ids_BL: Any, positions_BL: Any, *, rng: Any = None
    ) -> Any:
        """Hidden states after the last attention, (B, L, D). `rng` is not used: `shortened` takes no dropout."""
        decoder = self.model.decoder(whole=False)
        hidden_BLD: Any = decoder.apply(
            collections(_last_apart(self.model, params)), tokens_BL, segment_ids_BL, positions_BL
        )
        return hidden_BLD

    def unembed(self, params: Any) -> dict[str, Any]:
        """What `head_logits` reads of the parameters."""
        last = f"rest_{self.config.num_layers - 1}"
        apart = unroll_params(self.model, params) if self.model.scan else params
        mlp = {name: leaf for name, leaf in apart[last].items() if name not in _ATTENTION}
        if ADAPTERS in params:
            adapters = apart[ADAPTERS].get(last, {})
            mlp[ADAPTERS] = {name: leaf for name, leaf in adapters.items() if name not in _ATTENTION}
        return {"kernel": self.model.unembed(params), "mlp": mlp, "norm": params["final_norm"]}

    def head_logits(self, head: dict[str, Any], hidden_TD: jax.Array) -> jax.Array:
        """float32 logits (T, V) of what `hidden` gives."""
        settings = self.model.decoder().settings
        layer = Layer(self.config, self.config.kinds[-1], settings, "mlp")
        hidden_1TD, _ = layer.apply(collections(head["mlp"]), hidden_TD[None], None, None)
        norm = RMSNorm(self.config, settings.dtype, settings.param_dtype)
        normed_TD: Any = norm.apply({"params": head["norm"]}, hidden_1TD[0])
        return self.model.head_logits(head["kernel"], normed_TD)


def shortened(model: Model, chunk: int) -> tuple[Any, int]:
    """(model for the loss, tokens at a time): shortened where that can be, as given elsewhere.

    Not for experts, which see a whole batch; not with dropout of an adapter's input; and float32 alone, because within
    the head nothing is rounded to a narrower dtype between the layer's parts.
    """
    can = model.mesh is not None and is_one_cpu(model.mesh) and model.compute_dtype == "float32"
    can = can and not model.dropout and all(kind.experts is None for kind in model.config.kinds)
    return (Shortened(model), min(chunk, CHUNK)) if can else (model, chunk)


def _last_apart(model: Model, params: Any) -> Any:
    """Parameters whose last layer is not stacked with others: a last block of the stack becomes the rest."""
    period, repeats = layer_plan(model.config.kinds) if model.scan else (0, 0)
    if period * repeats < model.config.num_layers:
        return params
    found = {name: leaf for name, leaf in params.items() if name not in ("blocks", ADAPTERS)}
    blocks = params.get("blocks", {})
    if repeats > 1:
        found["blocks"] = jax.tree.map(lambda leaf: leaf[:-1], blocks)
    for i in range(period):
        found[f"rest_{i}"] = jax.tree.map(lambda leaf: leaf[-1], blocks.get(f"layer_{i}", {}))
    if ADAPTERS in params:
        found[ADAPTERS] = _last_apart(model, params[ADAPTERS])
    return found
