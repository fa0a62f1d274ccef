"""The last layer's MLP as part of the head: computed for the tokens that the loss asks for, and for no others.

After the last attention no token looks at another. The chunked loss leaves out tokens of weight 0 before the head, and
so it can before the MLP that comes ahead of it: where a third of the tokens are targets, two thirds of that work are
saved, forward and backward. For models of few layers on one CPU: elsewhere a layer is too small a part of the whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from itune.models.architecture import ModelConfig, layer_plan
from itune.models.layers import ADAPTERS, RMSNorm
from itune.models.model import Model, collections
from itune.models.transformer import Layer
from itune.sharding import is_one_cpu

CHUNK = 256  # tokens at a time, at most: the last turn is filled up, and each now costs an MLP besides the head
TOKENS = 128  # a layer and micro-batch, at least: fewer save less than the kernels' gradients cost, once more a turn
_LAST = "last_mlp"
_ATTENTION = ("attention", "attention_norm", "attention_post_norm")

Parameters = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Shortened:
    """A model as the loss sees it, whose hidden states end before the last layer's MLP, and whose head begins there.

    It reads what `parameters` gives. Hashable, as the model is.
    """

    model: Model

    @property
    def config(self) -> ModelConfig:
        return self.model.config

    @property
    def mesh(self) -> Any:
        return self.model.mesh

    def parameters(self, whole: Parameters) -> Parameters:
        """`whole(trainable, frozen)`, the model's parameters, with the last layer's MLP beside them."""
        return lambda trainable, frozen: self._fork(whole(trainable, frozen))

    def hidden(
        self, params: Any, tokens_BL: Any, segment_ids_BL: Any, positions_BL: Any, *, rng: Any = None
    ) -> Any:
        """Hidden states after the last attention, (B, L, D). `rng` is not used: `shortened` takes no dropout."""
        params = collections({name: leaf for name, leaf in params.items() if name != _LAST})
        return self.model.decoder(whole=False).apply(params, tokens_BL, segment_ids_BL, positions_BL)

    def unembed(self, params: Any) -> dict[str, Any]:
        """What `head_logits` reads of the parameters."""
        return {"kernel": self.model.unembed(params), "norm": params["final_norm"], "mlp": params[_LAST]}

    def head_logits(self, head: dict[str, Any], hidden_TD: jax.Array) -> jax.Array:
        """float32 logits (T, V) of what `hidden` gives."""
        settings = self.model.decoder().settings
        layer = Layer(self.config, self.config.kinds[-1], settings, "mlp")
        hidden_1TD, _ = layer.apply(collections(head["mlp"]), hidden_TD[None], None, None)
        norm = RMSNorm(self.config, settings.dtype, settings.param_dtype)
        normed_TD: Any = norm.apply({"params": head["norm"]}, hidden_1TD[0])
        return self.model.head_logits(head["kernel"], normed_TD)

    def _fork(self, params: Any) -> dict[str, Any]:
        """The parameters, the adapters among them, with the MLP of the last layer also by itself."""
        period, repeats = layer_plan(self.config.kinds) if self.model.scan else (0, 0)
        unstacked = self.config.num_layers - period * repeats
        if unstacked:
            forked, mlp = dict(params), _without_attention(params.get(f"rest_{unstacked - 1}", {}))
        else:
            blocks, name = params.get("blocks", {}), f"layer_{period - 1}"
            layer = blocks.get(name, {})
            leaves, structure = jax.tree.flatten(_without_attention(layer))
            pairs = [_with_last(leaf) for leaf in leaves]
            stack, mlp = (jax.tree.unflatten(structure, [pair[side] for pair in pairs]) for side in (0, 1))
            forked = {**params, "blocks": {**blocks, name: {**layer, **stack}}}
        if ADAPTERS in params:
            forked[ADAPTERS] = self._fork(params[ADAPTERS])
            mlp = {**mlp, ADAPTERS: forked[ADAPTERS].pop(_LAST)}
        return {**forked, _LAST: mlp}


def shortened(model: Model, chunk: int, tokens: int) -> tuple[Any, int]:
    """(model for the loss, tokens at a time): shortened where that can be and gains, as given elsewhere.

    `tokens` of a micro-batch. Not for experts, which see a whole batch; not with dropout of an adapter's input; and
    float32 alone, because within the head nothing is rounded to a narrower dtype between the layer's parts.
    """
    can = model.mesh is not None and is_one_cpu(model.mesh) and model.compute_dtype == "float32"
    can = can and not model.dropout and all(kind.experts is None for kind in model.config.kinds)
    gains = tokens >= TOKENS * model.config.num_layers
    return (Shortened(model), min(chunk, CHUNK)) if can and gains else (model, chunk)


def _without_attention(layer: Any) -> dict[str, Any]:
    return {name: leaf for name, leaf in layer.items() if name not in _ATTENTION}


@jax.custom_vjp
def _with_last(stacked: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A stack of layers' parameters, and those of the last, which nothing else may read from the stack."""
    return stacked, stacked[-1]


def _forward(stacked: jax.Array) -> Any:
    return _with_last(stacked), None


def _backward(_: None, gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array]:
    """The last one's gradient goes where the stack's is 0: written there, not added to it as a second stack."""
    stacked, last = gradients
    return (jax.lax.dynamic_update_index_in_dim(stacked, last, stacked.shape[0] - 1, 0),)


_with_last.defvjp(_forward, _backward)
