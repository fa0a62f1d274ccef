"""Norms, projections, rotary embeddings and the MLP. Kernels are stored (out, in), as Hugging Face stores them."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.sharding import Mesh

from itune.models.architecture import ModelConfig, Rope
from itune.models.entrywise import gated, rms_norm, shifted
from itune.models.remat import keep
from itune.models.row_major import Stored, as_stored, stored_on
from itune.types import InputError

# (module, parameter) -> logical axes of the unstacked parameter; see itune/sharding.py for where they go
AXES: dict[tuple[str, str], tuple[str, ...]] = {
    ("embed", "embedding"): ("vocab", "embed"),
    ("lm_head", "kernel"): ("vocab", "embed"),
    ("q_proj", "kernel"): ("heads", "embed"),
    ("k_proj", "kernel"): ("kv_heads", "embed"),
    ("v_proj", "kernel"): ("kv_heads", "embed"),
    ("qkv_proj", "kernel"): ("heads", "embed"),
    ("o_proj", "kernel"): ("embed", "heads"),
    ("gate_proj", "kernel"): ("mlp", "embed"),
    ("up_proj", "kernel"): ("mlp", "embed"),
    ("gate_up_proj", "kernel"): ("mlp", "embed"),
    ("down_proj", "kernel"): ("embed", "mlp"),
    ("router", "kernel"): ("norm", "embed"),
    ("q_proj", "bias"): ("heads",),
    ("k_proj", "bias"): ("kv_heads",),
    ("v_proj", "bias"): ("kv_heads",),
    ("o_proj", "bias"): ("norm",),
    ("gate_proj", "bias"): ("mlp",),
    ("up_proj", "bias"): ("mlp",),
    ("down_proj", "bias"): ("norm",),
    ("router", "bias"): ("norm",),
    ("attention", "sinks"): ("heads",),
    ("attention_norm", "scale"): ("norm",),
    ("mlp_norm", "scale"): ("norm",),
    ("attention_post_norm", "scale"): ("norm",),
    ("mlp_post_norm", "scale"): ("norm",),
    ("q_norm", "scale"): ("head_dim",),
    ("k_norm", "scale"): ("head_dim",),
    ("final_norm", "scale"): ("norm",),
}

ADAPTERS = "lora"  # the collection of low-rank adapters, beside "params" (itune/models/lora.py)

ACTIVATIONS: dict[str, Any] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
}


def precision(dtype: Any) -> jax.lax.Precision:
    """float32 compute means float32: without this a TPU or GPU would round the inputs of float32 products."""
    return jax.lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else jax.lax.Precision.DEFAULT


def linear(
    x: jax.Array, kernel_OI: jax.Array, dtype: Any, out_dtype: Any = None, stored: Stored | None = None
) -> jax.Array:
    """x (..., I) times a kernel stored (out, in) -> (..., O), computed in `dtype`; the result in `out_dtype`.

    In a dtype narrower than float32 the gradients come out in the dtypes of `x` and `kernel_OI` without being rounded
    to `dtype` on the way: the kernel's partial sums travel between devices in the kernel's dtype (contract 3).
    `stored`: see row_major.py. What waits for the backward pass is the kernel itself, which a scan holds already.
    """
    compute, out, of_x, of_kernel = (jnp.dtype(d).name for d in (dtype, out_dtype or dtype, x.dtype, kernel_OI.dtype))
    dtypes = _Dtypes(compute, out, of_x, of_kernel, stored)
    return _linear(dtypes, x, kernel_OI)


class _Dtypes(NamedTuple):
    compute: str
    out: str
    x: str
    kernel: str
    stored: Stored | None


def _product(x: jax.Array, kernel_OI: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    dimensions = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x.astype(dtype),
        kernel_OI.astype(dtype),
        dimensions,
        precision=precision(dtype),
        preferred_element_type=out_dtype,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(dtypes: _Dtypes, x: jax.Array, kernel_OI: jax.Array) -> jax.Array:
    return _product(x, _read(dtypes, kernel_OI), dtypes.compute, dtypes.out)


def _read(dtypes: _Dtypes, kernel_OI: jax.Array) -> jax.Array:
    return rounded_here(as_stored(dtypes.stored, kernel_OI), dtypes.compute)


def rounded_here(kernel_OI: jax.Array, dtype: str) -> jax.Array:
    """The kernel rounded to bfloat16's precision, still float32; the cast that follows changes nothing.

    Given a bare cast XLA rounds the kernels of all layers before a scan over them: on a TPU a second copy of the
    weights that lives through the step. It does not move this operation. (A barrier does not hold it either.)
    """
    if kernel_OI.dtype != jnp.float32 or dtype != "bfloat16":
        return kernel_OI
    return jax.lax.reduce_precision(kernel_OI, exponent_bits=8, mantissa_bits=7)


def _forward(dtypes: _Dtypes, x: Any, kernel_OI: Any) -> Any:
    """Keeps what the backward pass takes: a frozen kernel asks for no x, an x that needs no gradient for no kernel."""
    kept = x.value if kernel_OI.perturbed else None, kernel_OI.value if x.perturbed else None
    return _linear(dtypes, x.value, kernel_OI.value), kept


def _backward(dtypes: _Dtypes, kept: Any, cotangent: Any) -> tuple[jax.Array | None, jax.Array | None]:
    """Both products take operands of the compute dtype: left to itself, a float32 cotangent would make them float32."""
    if isinstance(cotangent, SymbolicZero):
        return None, None
    x, kernel_OI = kept
    cotangent = cotangent.astype(dtypes.compute)
    dx = dkernel_OI = None
    if kernel_OI is not None:
        dx = jax.lax.dot_general(
            cotangent, _read(dtypes, kernel_OI).astype(dtypes.compute),
            (((cotangent.ndim - 1,), (0,)), ((), ())), precision=precision(dtypes.compute),
            preferred_element_type=dtypes.x,
        )  # fmt: skip
    if x is not None:
        product = functools.partial(_sum_over_rows, precision=precision(dtypes.compute), dtype=dtypes.kernel)
        dkernel_OI = jax.lax.platform_dependent(
            cotangent, x.astype(dtypes.compute), cpu=functools.partial(_narrow_first, product), default=product
        )
        dkernel_OI = as_stored(dtypes.stored, dkernel_OI)
    return dx, dkernel_OI


def _sum_over_rows(a: jax.Array, b: jax.Array, precision: jax.lax.Precision, dtype: Any) -> jax.Array:
    """a (..., A) and b (..., B) -> (A, B), summed over all leading axes."""
    over = tuple(range(a.ndim - 1))
    return jax.lax.dot_general(a, b, ((over, over), ((), ())), precision=precision, preferred_element_type=dtype)


def _narrow_first(product: Any, a: jax.Array, b: jax.Array) -> jax.Array:
    """The same product with the narrower operand first, where turning the result costs little against turning that.

    XLA transposes the first operand of such a product on a CPU, and forms what it is made of a second time, in
    strides: a gated activation took as long as its products. An entry so formed costs about three that are only turned.
    The barrier keeps XLA from turning the product back.
    """
    rows, wide, narrow = math.prod(a.shape[:-1]), a.shape[-1], b.shape[-1]
    if wide < narrow or wide * narrow + rows * narrow > 3 * rows * wide:
        return product(a, b)
    return jax.lax.optimization_barrier(product(b, a)).T


_linear.defvjp(_forward, _backward, symbolic_zeros=True)


class Dense(nn.Module):
    """A projection to `features` with a kernel (features, in), and a low-rank adapter beside it where one is given.

    `dropout`: the share of the adapter's input entries that are zeroed when there is a dropout rng. Its name says the
    logical axes of its kernel.
    """

    features: int
    bias: bool
    init_std: float
    dtype: str
    param_dtype: str
    mesh: Mesh | None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.features, x.shape[-1])
        kernel = self.param("kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype)
        y = linear(x, kernel, self.dtype, stored=stored_on(self.mesh, AXES[str(self.name), "kernel"]))
        if self.has_variable(ADAPTERS, "a"):
            x = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(x)
            low = keep(linear(x, self.get_variable(ADAPTERS, "a"), self.dtype))
            y = y + linear(low, self.get_variable(ADAPTERS, "b"), self.dtype)
        if self.bias:
            y = shifted(y, self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype))
        return keep(y)


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467): the statistics in float32, the scale applied in the compute dtype,
    or in float32 where the config says so."""

    config: ModelConfig
    dtype: str
    param_dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        init = nn.initializers.zeros if c.norm_offset else nn.initializers.ones
        scale = self.param("scale", init, (x.shape[-1],), self.param_dtype)
        dtype = "float32" if c.norm_float32 else self.dtype
        return rms_norm(x, scale, eps=c.norm_eps, offset=int(c.norm_offset), dtype=dtype, out_dtype=self.dtype)


class MLP(nn.Module):
    """Gated MLP (arXiv 2002.05202): down(act(gate(x)) * up(x))."""

    config: ModelConfig
    dtype: str
    param_dtype: str
    mesh: Mesh | None
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c = self.config

        def dense(features: int, name: str) -> Dense:
            settings = (self.dtype, self.param_dtype, self.mesh, self.dropout)
            return Dense(features, c.mlp_bias, c.init_std, *settings, name=name)

        if c.fused_gate_up:
            gate_BLF, up_BLF = jnp.split(dense(2 * c.mlp_width, "gate_up_proj")(x_BLD), 2, axis=-1)
        else:
            gate_BLF, up_BLF = dense(c.mlp_width, "gate_proj")(x_BLD), dense(c.mlp_width, "up_proj")(x_BLD)
        return dense(c.width, "down_proj")(gated(ACTIVATIONS[c.activation], gate_BLF, up_BLF))


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which stays within -cap .. cap; None leaves x as it is."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def rope_frequencies(rope: Rope, head_dim: int, long: bool = False) -> np.ndarray:
    """Radians a token for each rotated pair of channels, float32, (int(share * head_dim) / 2,).

    `long`: for a sequence longer than the original context, where longrope has other factors. The order of roundings
    is that of transformers: one unit in the last place is 0.001 radians at position 10,000.
    """
    head_dim = int(head_dim * rope.share)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    periods = np.power(np.float64(np.float32(rope.base)), exponents.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / periods
    if rope.scaling in ("none", "dynamic"):
        return inverse
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(rope, inverse)
    if rope.scaling == "yarn":
        return _yarn(rope, periods, head_dim)
    if rope.scaling == "longrope":
        factors = np.asarray(rope.long_factors if long else rope.short_factors, np.float32)
        return np.float32(1.0) / (factors * periods)
    raise InputError(
        f"rope scaling {rope.scaling!r} is not supported; supported: none, linear, llama3, yarn, dynamic, longrope"
    )


def _llama3(rope: Rope, inverse: np.ndarray) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended (Llama 3.1)."""
    low, high, factor = (np.float32(x) for x in (rope.low_freq_factor, rope.high_freq_factor, rope.factor))
    one = np.float32(1.0)
    turns = one / (one / inverse * np.float32(2 * math.pi)) * np.float32(rope.original_length)
    kept = np.clip((turns - low) / (high - low), np.float32(0), one)
    return (1 - kept) * inverse / factor + kept * inverse


def _yarn(rope: Rope, periods: np.ndarray, head_dim: int) -> np.ndarray:
    """Channels with many turns in the original context are kept, those with few are interpolated (arXiv 2309.00071)."""

    def channel(turns: float) -> float:
        return head_dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    high = high + 0.001 if low == high else high
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, np.float32(0), np.float32(1))
    stretched = np.float32(1.0) / (np.float32(rope.factor) * periods)
    return stretched * (1 - kept) + np.float32(1.0) / periods * kept


def rope_tables(
    rope: Rope, head_dim: int, positions_BL: jax.Array, dtype: Any, long_BL: jax.Array | bool = False
) -> tuple[jax.Array, jax.Array]:
    """cos and sin of every position, (B, L, 1, rotated / 2): angles in float32, the result in `dtype`.

    `long_BL`: whether the token's sequence is longer than the original context; only longrope asks.
    """
    frequencies: Any = rope_frequencies(rope, head_dim)
    if rope.scaling == "longrope":
        long_BL = jnp.broadcast_to(long_BL, positions_BL.shape)[:, :, None, None]
        frequencies = jnp.where(long_BL, rope_frequencies(rope, head_dim, long=True), frequencies)
    angles = positions_BL[:, :, None, None].astype(jnp.float32) * frequencies
    return (jnp.cos(angles) * rope.attention_factor).astype(dtype), (jnp.sin(angles) * rope.attention_factor).astype(
        dtype
    )


def rotate(x_BLNH: jax.Array, tables: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate channel pairs (i, i + rotated / 2), the layout of Hugging Face checkpoints; later channels stay."""
    cos, sin = tables
    half = cos.shape[-1]
    first, second, rest = x_BLNH[..., :half], x_BLNH[..., half : 2 * half], x_BLNH[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)
