"""Model: a decoder's config and how to run it. Its methods are pure functions of parameters."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from itune.models.architecture import ModelConfig
from itune.models.attention.cache import init_cache
from itune.models.balance import BALANCE, balance_loss
from itune.models.layers import ADAPTERS, AXES, linear, softcap
from itune.models.transformer import Decoder, Settings
from itune.sharding import check_divisible, expert_axes, tree_shardings


@dataclasses.dataclass(frozen=True)
class Model:
    """A decoder, hashable, so that jit may take it as a static argument.

    Parameters are a nested dict: embed, blocks (stacked over repetitions of the block), rest_i (unrolled layers),
    final_norm, and lm_head unless the embedding is tied; lora where there are adapters. Kernels are (out, in).
    """

    config: ModelConfig
    family: str
    compute_dtype: str = "float32"
    param_dtype: str = "float32"
    attention: str = "auto"
    remat: str = "none"
    mesh: Mesh | None = None
    max_segments: int = 0  # examples in the fullest row, padding counted as one; 0 is unknown (cuDNN then allows 32)
    dropout: float = 0.0  # of what enters an adapter, where an rng is given (itune/models/lora.py)
    scan: bool = True  # False: no layer is stacked; only for parameters of itune/models/unrolled.py

    def init(self, rng: jax.Array) -> Any:
        """Random parameters, placed on the mesh where there is one (each device makes its own shard)."""
        return jax.jit(self._init, out_shardings=self.shardings())(rng)

    def abstract_params(self) -> Any:
        """The tree of jax.ShapeDtypeStruct that `init` returns."""
        return _abstract_params(self)

    def logical_axes(self) -> Any:
        """The same tree with a tuple of logical axis names a leaf."""
        return jax.tree_util.tree_map_with_path(functools.partial(_axes, self.mesh), self.abstract_params())

    def shardings(self) -> Any:
        """The same tree with the sharding of each parameter on the mesh; None without a mesh.

        Raises InputError for a parameter that its mesh axes do not divide.
        """
        if self.mesh is None:
            return None
        check_divisible(self.mesh, self.abstract_params(), self.logical_axes())
        return tree_shardings(self.mesh, self.logical_axes())

    def hidden(
        self,
        params: Any,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
    ) -> jax.Array:
        """Hidden states after the final norm, (B, L, D), compute dtype.

        `rng` is for `dropout`: without one nothing is drawn.
        """
        return self._apply(params, tokens_BL, segment_ids_BL, positions_BL, rng, False)

    def hidden_and_balance(
        self,
        params: Any,
        tokens_BL: jax.Array,
        segment_ids_BL: jax.Array | None = None,
        positions_BL: jax.Array | None = None,
        *,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`hidden`, and the load-balancing loss of its routers (float32, see `itune.models.moe.balance_loss`)."""
        hidden_BLD, left = self._apply(params, tokens_BL, segment_ids_BL, positions_BL, rng, [BALANCE])
        return hidden_BLD, balance_loss(left[BALANCE])

    def _apply(
        self, params: Any, tokens_BL: Any, segments_BL: Any, positions_BL: Any, rng: jax.Array | None, mutable: Any
    ) -> Any:
        segments_BL, positions_BL = _defaults(tokens_BL, segments_BL, positions_BL)
        rngs = {"dropout": rng} if rng is not None and self.dropout else None
        return self.decoder().apply(
            collections(params), tokens_BL, segments_BL, positions_BL, rngs=rngs, mutable=mutable
        )

    def unembed(self, params: Any) -> jax.Array:
        """The kernel (V, D) that turns hidden states into logits, as stored: the head, or the tied embedding."""
        return params["embed"]["embedding"] if self.config.tie_embeddings else params["lm_head"]["kernel"]

    def logits(self, params: Any, hidden: jax.Array) -> jax.Array:
        """float32 logits (..., V) of hidden states (..., D): of a whole batch, or of the rows of one chunk."""
        return self.head_logits(self.unembed(params), hidden)

    def head_logits(self, kernel_VD: jax.Array, hidden: jax.Array) -> jax.Array:
        """float32 logits (..., V) with this kernel, or a shard of its rows: the chunked loss differentiates this."""
        logits = linear(hidden, kernel_VD, self.compute_dtype, "float32")
        scale = self.config.logit_scale
        return softcap(logits if scale == 1 else logits * scale, self.config.logit_softcap)

    def init_cache(self, batch: int, length: int) -> Any:
        """An empty KV cache for `batch` rows of at most `length` tokens; see itune/models/attention/cache.py."""
        return init_cache(self.config, batch, length, self.compute_dtype, self.mesh)

    def hidden_with_cache(
        self,
        params: Any,
        tokens_BL: jax.Array,
        positions_BL: jax.Array,
        cache: Any,
        *,
        segment_ids_BL: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Prefill (L > 1) or decode (L = 1): hidden states (B, L, D), and the cache with these tokens in it.

        The tokens go to slots cache["index"] .. + L of every row. Padding, on either side, has segment 0 and is never
        attended. The caller sees to it that the slots suffice: past the end a write would land on the last slots.
        """
        segments_BL, positions_BL = _defaults(tokens_BL, segment_ids_BL, positions_BL)
        both: Any = self.decoder().apply(collections(params), tokens_BL, segments_BL, positions_BL, cache)
        return both

    def decoder(self, whole: bool = True) -> Decoder:
        """The flax module that reads `collections(params)`; not `whole`: up to the last layer's MLP (`tail.py`)."""
        settings = {name: getattr(self, name) for name in Settings._fields if name not in ("dtype", "whole")}
        return Decoder(self.config, Settings(dtype=self.compute_dtype, whole=whole, **settings))

    def _init(self, rng: jax.Array) -> Any:
        tokens_BL = jnp.zeros((1, 1), jnp.int32)
        return self.decoder().init(rng, tokens_BL, tokens_BL, tokens_BL)["params"]


@functools.partial(jax.jit, static_argnums=0)
def forward(
    model: Model,
    params: Any,
    tokens_BL: jax.Array,
    segment_ids_BL: jax.Array | None = None,
    positions_BL: jax.Array | None = None,
) -> jax.Array:
    """float32 logits (B, L, V). Segments default to one a row, positions to 0 .. L-1; segment 0 is padding."""
    return model.logits(params, model.hidden(params, tokens_BL, segment_ids_BL, positions_BL))


@functools.lru_cache(maxsize=64)
def _abstract_params(model: Model) -> Any:
    return jax.eval_shape(model._init, jax.eval_shape(lambda: jax.random.key(0)))


def _axes(mesh: Mesh | None, path: tuple, leaf: jax.ShapeDtypeStruct) -> tuple[str, ...]:
    names = [entry.key for entry in path]
    axes = AXES[names[-2], names[-1]]
    stacked = names[0] == "blocks"
    axes = expert_axes(mesh, leaf.shape[int(stacked)], axes) if "experts" in names else axes
    return ("layers", *axes) if stacked else axes


def collections(params: Any) -> dict[str, Any]:
    """Parameters as flax takes them: adapters are a collection of their own."""
    base = {name: leaf for name, leaf in params.items() if name != ADAPTERS}
    return {"params": base, **({ADAPTERS: params[ADAPTERS]} if ADAPTERS in params else {})}


def _defaults(tokens_BL, segments_BL, positions_BL):
    if segments_BL is None:
        segments_BL = jnp.ones(tokens_BL.shape, jnp.int32)
    if positions_BL is None:
        positions_BL = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)
    return segments_BL, positions_BL
