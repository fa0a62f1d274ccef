"""Floating-point operations that a step really does, counted in its jaxpr: loops by trip count, kernels by formula.

What automatic differentiation and rematerialisation add stands in the jaxpr, so recomputation and waste show. What
nothing reads is left out, as XLA leaves it out. It may remove still more; its own count is no use here: it takes
the body of a loop once.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

# flash attention: products of queries, keys and head width that a kernel does, over those of the forward pass
KERNELS = {"preprocess": 0.0, "fwd": 1.0, "dkv": 2.5, "bwd": 2.5, "backward": 2.5, "dq": 1.5}
CUDNN = "dot_product_attention_"  # what JAX calls cuDNN's, before fwd and bwd
GPU_PALLAS = "mha_"  # and the names of Pallas kernels for GPUs begin with


def count_flops(jaxpr: Any, turns: int = 1, visible: float = 0.5) -> dict[str, float]:
    """FLOPs of matrix products ("products"), of "attention" kernels, of products with "float32" operands, and "exact":
    of those, what asks for float32's precision. A TPU rounds the operands of the others to bfloat16.

    `jaxpr`: a ClosedJaxpr, all devices together. `turns`: trip count of loops whose own is not static (the chunks of
    the loss). `visible`: share of the (query, key) square that a kernel computes.
    """
    total: dict[str, float] = collections.defaultdict(float)
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    _count(dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0], 1.0, turns, visible, total)
    return {name: total[name] for name in ("products", "attention", "float32", "exact")}


def _count(jaxpr: Any, times: float, turns: int, visible: float, total: dict[str, float]) -> None:
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in ("dot_general", "ragged_dot_general", "ragged_dot"):
            flops = times * _product(equation)
            total["products"] += flops
            if all(v.aval.dtype == np.float32 for v in equation.invars[:2]) and _is_matrix(equation):
                total["float32"] += flops
                total["exact"] += flops if _is_exact(equation) else 0.0
        elif name == "pallas_call" or name.startswith(CUDNN):
            total["attention"] += times * _kernel(equation, visible)
        else:
            inner = times * _repeats(equation, turns)
            for body in bodies(equation):
                _count(body, inner, turns, visible, total)


def bodies(equation: Any) -> Iterator[Any]:
    """The jaxprs inside an equation; of a cond only the dearest branch would run, the first is taken."""
    if equation.primitive.name == "cond":
        yield equation.params["branches"][0].jaxpr
        return
    for value in equation.params.values():
        for leaf in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            leaf = getattr(leaf, "jaxpr", leaf)
            if hasattr(leaf, "eqns"):
                yield leaf


def _repeats(equation: Any, turns: int) -> float:
    """How often an equation's body runs. Inside a shard_map shapes are one device's: it counts once a device."""
    name = equation.primitive.name
    if name == "scan":
        return float(equation.params["length"])
    if name == "while":
        return float(turns)
    if name == "shard_map":
        return float(equation.params["mesh"].size)
    return 1.0


def _is_matrix(equation: Any) -> bool:
    """Whether both sides have rows of their own: sums of entrywise products are no work for a matrix unit."""
    if equation.primitive.name != "dot_general":
        return True
    contracted, batch = equation.params["dimension_numbers"]
    sides = zip(equation.invars[:2], contracted, batch)
    return all(v.aval.ndim > len(summed) + len(shared) for v, summed, shared in sides)


def _is_exact(equation: Any) -> bool:
    precision = equation.params["precision"]
    return jax.lax.Precision.HIGHEST in (precision if isinstance(precision, tuple) else (precision,))


def _product(equation: Any) -> float:
    left, right = (v.aval.shape for v in equation.invars[:2])
    if equation.primitive.name == "dot_general":
        (contracted, _), (batch, _) = equation.params["dimension_numbers"]
        out = math.prod(equation.outvars[0].aval.shape)
        del batch, right
        return 2.0 * out * math.prod(left[d] for d in contracted)
    # ragged: each row meets one group's matrix; whatever side is ragged, rows x the two widths
    rows = left[0]
    if len(right) == 3:
        return 2.0 * rows * right[1] * right[2]
    return 2.0 * rows * left[1] * right[1]


def _kernel(equation: Any, visible: float) -> float:
    """An attention kernel by formula: 4 rows x heads x queries x keys x width, of which a share is visible."""
    params, primitive = equation.params, equation.primitive.name
    name = primitive if primitive.startswith(CUDNN) else str(params.get("name_and_src_info", params.get("name", "")))
    factor = next((factor for part, factor in KERNELS.items() if part in name), 1.0)
    floats = [v.aval for v in equation.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]  # masks come first
    shapes = [aval.shape for aval in floats if aval.ndim >= 3]
    if not shapes:
        return 0.0
    query = shapes[0]  # (..., N, L, H), on GPUs (B, L, N, H); keys may have fewer heads and are as long
    length = query[-3] if name.startswith((CUDNN, GPU_PALLAS)) else max(shape[-2] for shape in shapes[:3])
    return factor * 4.0 * math.prod(query[:-1]) * length * query[-1] * visible
