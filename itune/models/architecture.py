"""Every architectural switch of the decoder, without a family's name. Families translate their configs to this."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base frequency and how it is stretched to longer contexts.

    scaling: none | linear (positions divided by `factor`) | llama3 (by wavelength, as in Llama 3.1) | yarn
    (arXiv 2309.00071) | dynamic (none up to `original_length`; longer rows are refused, because its base would then
    depend on the longest row of the batch) | longrope (arXiv 2402.13753: each channel pair's period times its entry of
    `short_factors`, in sequences longer than `original_length` of `long_factors`). `original_length` is the context of
    pretraining in tokens; `attention_factor` multiplies cos and sin (yarn, longrope). `share` is the part of a head's
    channels that is rotated, the first ones; the others carry no position.
    """

    base: float = 10000.0
    scaling: str = "none"
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    share: float = 1.0


@dataclasses.dataclass(frozen=True)
class Experts:
    """Mixture of experts in place of the MLP: `count` of them, `chosen` a token, each `width` wide.

    A token's weights are the softmax of its router logits over all experts, rescaled to sum to one when `normalise`;
    or, with `softmax_chosen`, the softmax over the chosen ones. `biases`: on the router and every projection.
    `clamp`: (alpha, limit) of a clamped gate, (min(gate, limit) * sigmoid(alpha * gate)) * (clip(up, limit) + 1), in
    place of act(gate) * up.
    """

    count: int
    chosen: int
    width: int
    normalise: bool = True
    softmax_chosen: bool = False
    biases: bool = False
    clamp: tuple[float, float] | None = None


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ between the layers of one model, all of it static.

    window: tokens a query sees, itself included (None sees all before it). rope None: no position embedding. experts
    None: a dense MLP.
    """

    window: int | None = None
    rope: Rope | None = Rope()
    experts: Experts | None = None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One decoder. Widths in elements; `kinds` has one LayerKind a layer; `max_length` is in tokens.

    fused_qkv, fused_gate_up: one kernel holds query, key and value, or gate and up, as its checkpoints store them.
    norm_offset: a norm multiplies by 1 + its scale. norm_float32: it does so in float32, before rounding.
    norm_placement: a norm before attention and MLP (pre), after them and before the residual sum (post), or both.
    qk_norm: norms of queries and keys, by head; with qk_norm_whole over all heads at once. sinks: a learned score a
    head that takes part in the softmax of attention and has no value. attention_scale multiplies scores (None: 1/sqrt
    of head_dim); softcap c turns x into c * tanh(x / c). embed_scale, residual_scale and logit_scale multiply
    embeddings, what attention and MLP add, and logits (before their softcap).
    """

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    kinds: tuple[LayerKind, ...]
    max_length: int
    activation: str = "silu"
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_whole: bool = False
    fused_qkv: bool = False
    fused_gate_up: bool = False
    norm_offset: bool = False
    norm_float32: bool = False
    norm_placement: str = "pre"
    sinks: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    tie_embeddings: bool = False
    init_std: float = 0.02

    def __post_init__(self) -> None:
        if len(self.kinds) != self.num_layers:
            raise ValueError(f"{self.num_layers} layers need as many kinds, found {len(self.kinds)}")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} key/value heads")

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary embeddings of the model, each once."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds if kind.rope is not None))


def layer_plan(kinds: tuple[LayerKind, ...]) -> tuple[int, int]:
    """(period, repeats): the first period * repeats layers repeat one block and are scanned, the others are unrolled.

    The choice leaves the fewest layers to compile; among equals the shortest block.
    """
    best = (len(kinds), 1)
    cost = len(kinds)
    for period in range(1, len(kinds)):
        repeats = 1
        while kinds[repeats * period : (repeats + 1) * period] == kinds[:period]:
            repeats += 1
        unrolled = period + len(kinds) - period * repeats
        if unrolled < cost:
            best, cost = (period, repeats), unrolled
    return best
