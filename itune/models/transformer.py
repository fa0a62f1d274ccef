"""The decoder: embedding, blocks of layers scanned over their repetitions, the remainder unrolled, final norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from itune.models.architecture import LayerKind, ModelConfig, Rope, layer_plan
from itune.models.attention import attention
from itune.models.attention.cache import read, write
from itune.models.balance import BALANCE
from itune.models.layers import ADAPTERS, MLP, Dense, RMSNorm, rope_tables, rotate
from itune.models.lookup import lookup
from itune.models.moe import MoE
from itune.models.remat import remat
from itune.sharding import constrain, platform
from itune.types import InputError


class Settings(NamedTuple):
    """How the decoder runs, as opposed to what it is."""

    dtype: str
    param_dtype: str
    attention: str
    remat: str
    mesh: Mesh | None
    max_segments: int = 0
    scan: bool = True
    dropout: float = 0.0
    whole: bool = True  # False: up to the last layer's MLP, which tail.py computes


class Context(NamedTuple):
    """What every layer reads: segments of queries and keys, positions (only with a cache), slot of the first query."""

    q_segments_BL: jax.Array
    kv_segments_BS: jax.Array
    q_positions_BL: jax.Array | None
    kv_positions_BS: jax.Array | None
    start: jax.Array | None
    ropes: tuple[tuple[jax.Array, jax.Array], ...]


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding; reads and writes its slice of the KV cache where one is given."""

    config: ModelConfig
    kind: LayerKind
    settings: Settings

    @nn.compact
    def __call__(self, x_BLD: jax.Array, cache: Any, context: Context) -> tuple[jax.Array, Any]:
        c, s = self.config, self.settings

        query_BLNH, key_BLKH, value_BLKH = self._project(x_BLD)
        if self.kind.rope is not None:
            tables = context.ropes[c.ropes.index(self.kind.rope)]
            query_BLNH, key_BLKH = rotate(query_BLNH, tables), rotate(key_BLKH, tables)
        if cache is not None:
            cache = write(cache, key_BLKH, value_BLKH, context.start)
            key_BLKH, value_BLKH = read(cache)
        mixed_BLNH = attention(
            query_BLNH,
            key_BLKH,
            value_BLKH,
            q_segments_BL=context.q_segments_BL,
            kv_segments_BS=context.kv_segments_BS,
            q_positions_BL=context.q_positions_BL,
            kv_positions_BS=context.kv_positions_BS,
            offset=0 if context.start is None else context.start,
            window=self.kind.window,
            scale=c.attention_scale,
            softcap=c.attention_softcap,
            sinks_N=self.param("sinks", nn.initializers.zeros, (c.num_heads,), s.param_dtype) if c.sinks else None,
            backend=s.attention,
            mesh=s.mesh,
            max_segments=s.max_segments,
        )
        out = Dense(c.width, c.out_bias, c.init_std, s.dtype, s.param_dtype, s.mesh, s.dropout, name="o_proj")
        return out(mixed_BLNH.reshape(*x_BLD.shape[:2], -1)), cache

    def _project(self, x_BLD: jax.Array) -> list[jax.Array]:
        """Query (B, L, N, H), key and value (B, L, K, H), normed where the config has norms on them."""
        c, s = self.config, self.settings
        heads = {"q": c.num_heads, "k": c.num_kv_heads, "v": c.num_kv_heads}

        def dense(name: str, heads: int) -> jax.Array:
            width = heads * c.head_dim
            settings = (s.dtype, s.param_dtype, s.mesh, s.dropout)
            return Dense(width, c.qkv_bias, c.init_std, *settings, name=name)(x_BLD)

        if c.fused_qkv:
            cuts = [c.num_heads * c.head_dim, (c.num_heads + c.num_kv_heads) * c.head_dim]
            flat = dict(zip(heads, jnp.split(dense("qkv_proj", sum(heads.values())), cuts, axis=-1), strict=True))
        else:
            flat = {name: dense(f"{name}_proj", count) for name, count in heads.items()}
        split = []
        for name, count in heads.items():
            normed = c.qk_norm and name != "v"
            norm = RMSNorm(c, s.dtype, s.param_dtype, name=f"{name}_norm") if normed else lambda x: x
            y = flat[name]
            if normed and self.has_variable(ADAPTERS, f"{name}_proj") and platform(s.mesh) == "tpu":
                # in one fusion with the norms, the sum of base and adapter aborts libtpu 0.0.52 on v5e and v5p
                # ("split of a padded window dim")
                y = jax.lax.optimization_barrier(y)
            y = norm(y) if c.qk_norm_whole else y
            y = y.reshape(*y.shape[:2], count, c.head_dim)
            split.append(y if c.qk_norm_whole else norm(y))
        return split


class Layer(nn.Module):
    """Residual layer: attention, then the MLP or the experts, with norms before or after each, or both.

    `half`: "attention" or "mlp" alone; "" is both. The MLP by itself takes no context. `last`, a traced boolean:
    whether to leave out the MLP (itune/models/tail.py).
    """

    config: ModelConfig
    kind: LayerKind
    settings: Settings
    half: str = ""

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array, cache: Any, context: Context, last: Any = None) -> tuple[jax.Array, Any]:
        c, s = self.config, self.settings

        def norm(name: str, places: tuple[str, ...], x: jax.Array) -> jax.Array:
            return RMSNorm(c, s.dtype, s.param_dtype, name=name)(x) if c.norm_placement in places else x

        def add(hidden_BLD: jax.Array, x_BLD: jax.Array) -> jax.Array:
            return hidden_BLD + (x_BLD if c.residual_scale == 1 else x_BLD * c.residual_scale)

        before, after = ("pre", "both"), ("post", "both")
        if self.half != "mlp":
            normed_BLD = norm("attention_norm", before, hidden_BLD)
            mixed_BLD, cache = Attention(c, self.kind, s, name="attention")(normed_BLD, cache, context)
            hidden_BLD = add(hidden_BLD, norm("attention_post_norm", after, mixed_BLD))

        def after_attention(_: Any, hidden_BLD: jax.Array) -> jax.Array:
            normed_BLD = norm("mlp_norm", before, hidden_BLD)
            if self.kind.experts is None:
                mixed_BLD = MLP(c, s.dtype, s.param_dtype, s.mesh, s.dropout, name="mlp")(normed_BLD)
            else:
                mixed_BLD = MoE(c, self.kind.experts, s.dtype, s.param_dtype, s.mesh, name="mlp")(
                    normed_BLD, context.q_segments_BL
                )
            return add(hidden_BLD, norm("mlp_post_norm", after, mixed_BLD))

        if self.half == "attention":
            return hidden_BLD, cache
        if last is None:
            hidden_BLD = after_attention(self, hidden_BLD)
        else:
            hidden_BLD = nn.cond(last, lambda _, hidden_BLD: hidden_BLD, after_attention, self, hidden_BLD)
        return constrain(hidden_BLD, s.mesh, ("batch", "length", None)), cache


class Block(nn.Module):
    """The layers of one repetition. Carries hidden, maps over the cache and over whether this repetition ends the model
    before its last MLP (None: none does): the shape that nn.scan wants."""

    config: ModelConfig
    kinds: tuple[LayerKind, ...]
    settings: Settings

    @nn.compact
    def __call__(self, hidden_BLD: jax.Array, caches: Any, last: Any, context: Context) -> tuple[jax.Array, Any]:
        layer_class = remat(Layer, self.settings.remat, inside_scan=True)
        written = []
        for i, kind in enumerate(self.kinds):
            layer = layer_class(self.config, kind, self.settings, name=f"layer_{i}")
            ends = last if i + 1 == len(self.kinds) else None
            hidden_BLD, cache = layer(hidden_BLD, None if caches is None else caches[i], context, ends)
            written.append(cache)
        return hidden_BLD, None if caches is None else tuple(written)


class Decoder(nn.Module):
    """Tokens -> hidden states after the final norm (and the KV cache with these tokens in it).

    Where `settings.whole` is False: hidden states after the last attention, and no cache.
    """

    config: ModelConfig
    settings: Settings

    @nn.compact
    def __call__(self, tokens_BL: jax.Array, segments_BL: jax.Array, positions_BL: jax.Array, cache: Any = None) -> Any:
        c, s = self.config, self.settings
        hidden_BLD = Embed(c, s, name="embed")(tokens_BL)
        hidden_BLD = constrain(hidden_BLD, s.mesh, ("batch", "length", None))
        context = make_context(c, s, segments_BL, positions_BL, cache)
        period, repeats = layer_plan(c.kinds) if s.scan else (0, 0)
        last = jnp.arange(repeats) == repeats - 1 if not s.whole and period * repeats == c.num_layers else None
        blocks_cache: Any = ()
        if repeats:
            scanned = nn.scan(
                Block,
                variable_axes={"params": 0, ADAPTERS: 0, BALANCE: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=(0, 0, nn.broadcast),
                length=repeats,
                check_constancy_invariants=False,  # nothing is broadcast out of the scan: saves tracing the block twice
            )
            blocks = scanned(c, c.kinds[:period], s, name="blocks")
            hidden_BLD, blocks_cache = blocks(hidden_BLD, None if cache is None else cache["blocks"], last, context)
        rest, rest_cache = c.kinds[period * repeats :], []
        for i, kind in enumerate(rest):
            half = "" if s.whole or i + 1 < len(rest) else "attention"
            layer_class = Layer if half else remat(Layer, s.remat, inside_scan=False)  # its backward pass comes next
            layer = layer_class(c, kind, s, half, name=f"rest_{i}")
            hidden_BLD, written = layer(hidden_BLD, None if cache is None else cache["rest"][i], context)
            rest_cache.append(written)
        if not s.whole:
            return hidden_BLD
        hidden_BLD = RMSNorm(c, s.dtype, s.param_dtype, name="final_norm")(hidden_BLD)
        if self.is_initializing() and not c.tie_embeddings:
            Head(c, s, name="lm_head")()
        if cache is None:
            return hidden_BLD
        after = {
            "index": cache["index"] + tokens_BL.shape[1],
            "segments": context.kv_segments_BS,
            "positions": context.kv_positions_BS,
            "blocks": blocks_cache,
            "rest": tuple(rest_cache),
        }
        return hidden_BLD, after


class Embed(nn.Module):
    """Rows of the embedding in the compute dtype."""

    config: ModelConfig
    settings: Settings

    @nn.compact
    def __call__(self, tokens_BL: jax.Array) -> jax.Array:
        c, s = self.config, self.settings
        init = nn.initializers.normal(c.init_std)
        embedding_VD = self.param("embedding", init, (c.vocab_size, c.width), s.param_dtype)
        rows_BLD = lookup(embedding_VD, tokens_BL, s.dtype, s.mesh)
        return rows_BLD if c.embed_scale == 1 else rows_BLD * jnp.asarray(c.embed_scale, s.dtype)


class Head(nn.Module):
    """Holds the kernel of an untied head; `Model.logits` applies it, in chunks where the loss wants them."""

    config: ModelConfig
    settings: Settings

    @nn.compact
    def __call__(self) -> jax.Array:
        c, s = self.config, self.settings
        return self.param("kernel", nn.initializers.normal(c.init_std), (c.vocab_size, c.width), s.param_dtype)


def make_context(c: ModelConfig, s: Settings, segments_BL: jax.Array, positions_BL: jax.Array, cache: Any) -> Context:
    """What the layers share, with these tokens' segments and positions written into the cache's."""
    slots = segments_BL.shape[1]
    for rope in c.ropes:  # with a cache, prompt and answer end at the longest context, whatever slots there are
        if rope.scaling == "dynamic" and cache is None and slots > rope.original_length:
            raise InputError(
                f"rows of {slots} tokens: beyond {rope.original_length} dynamic rope scaling depends on the batch "
                f"and is not supported; make rows at most {rope.original_length} tokens"
            )
    ropes = tuple(
        rope_tables(rope, c.head_dim, positions_BL, s.dtype, is_long(rope, segments_BL, positions_BL, cache))
        for rope in c.ropes
    )
    if cache is None:
        return Context(segments_BL, segments_BL, None, None, None, ropes)
    index = cache["index"]
    kv_segments_BS = jax.lax.dynamic_update_slice_in_dim(cache["segments"], segments_BL, index, axis=1)
    kv_positions_BS = jax.lax.dynamic_update_slice_in_dim(cache["positions"], positions_BL, index, axis=1)
    return Context(segments_BL, kv_segments_BS, positions_BL, kv_positions_BS, index, ropes)


def is_long(rope: Rope, segments_BL: jax.Array, positions_BL: jax.Array, cache: Any) -> Any:
    """Whether each token's sequence is longer than the original context of `rope`; only longrope asks.

    A segment is judged by itself, so packing changes nothing. With a cache each row is judged by the furthest of these
    tokens: keys are rotated once, when they are written, so that a row may not cross the original context in one cache
    (itune/decode.py begins it anew there).
    """
    if rope.scaling != "longrope":
        return False
    if cache is not None:
        return jnp.max(positions_BL, axis=1, keepdims=True) >= rope.original_length

    def one_row(segments_L: jax.Array, positions_L: jax.Array) -> jax.Array:
        return jax.ops.segment_max(positions_L, segments_L, num_segments=segments_L.shape[0] + 1)[segments_L]

    return jax.vmap(one_row)(segments_BL, positions_BL) >= rope.original_length
