"""The row `experts` of benchmarks/gpu.py: a mixture of experts in training, and its layer against a plain sum."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu_rows import llama, train
from itune.models.moe import MoE, route


def experts(tiny: bool, **options: Any) -> dict[str, Any]:
    """Training of a mixture of experts, and its layer against a sum over all experts in float32."""
    sizes = {"rows": 8, "length": 2048, "steps": 14, **options}
    name = "tiny_experts" if tiny else "experts"
    error = {} if "compiled_for" in options else _mixture_error(name)  # nothing runs where it is only compiled
    return {**error, **train(name, False, **sizes)}


def _mixture_error(size: str, tokens: int = 512) -> dict[str, float]:
    """Largest differences of the layer's output and gradients, over the largest entry, in float32."""
    config = llama(size, None).config
    mixture: Any = config.kinds[0].experts
    layer = MoE(config, mixture, "float32", "float32", None)
    x_BLD = jax.random.normal(jax.random.key(0), (1, tokens, config.width))
    segments_BL = jnp.ones((1, tokens), jnp.int32)
    params = layer.init(jax.random.key(1), x_BLD, segments_BL)

    def every_expert(params: Any, x_BLD: jax.Array) -> jax.Array:
        of = params["params"]
        chosen, weights = route(mixture, x_BLD @ of["router"]["kernel"].T)
        gate, up, down = (of["experts"][f"{name}_proj"]["kernel"] for name in ("gate", "up", "down"))
        inner = jax.nn.silu(jnp.einsum("bld,efd->blef", x_BLD, gate)) * jnp.einsum("bld,efd->blef", x_BLD, up)
        share = jnp.sum(jax.nn.one_hot(chosen, mixture.count) * weights[..., None], axis=2)
        return jnp.einsum("blef,edf,ble->bld", inner, down, share)

    def both(call: Any) -> Any:
        loss = lambda params, x: jnp.sum(jnp.sin(call(params, x)))  # noqa: E731
        return jax.jit(call)(params, x_BLD), jax.jit(jax.grad(loss, argnums=(0, 1)))(params, x_BLD)

    with jax.default_matmul_precision("highest"):
        ours, theirs = (jax.tree.leaves(both(call)) for call in (
            lambda params, x: layer.apply(params, x, segments_BL), every_expert))
    return {"largest_error": max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(ours, theirs))}
