"""LoRA (Hu et al., arXiv 2106.09685): low-rank adapters beside frozen projections, as a second collection of the model.

A projection of the parameters has an adapter {"a": (rank, in), "b": (out, rank)}, stacked over layers and experts as
its kernel is, and computes x K^T + (x a^T) (scale b)^T. The sum K + scale b a is never formed while training.

    lora = Lora(rank=16, alpha=32)
    adapters = init_adapters(model, lora, jax.random.key(0))  # float32, on the model's mesh
    objective = make_sft(model, parameters=lora.parameters)
    state = init_state(model, adapters, optimizer, seed, mesh, frozen=params)  # params of any dtype, never copied
    logits_BLV = forward(model, lora.parameters(adapters, params), tokens_BL)
    tuned = merge(model, lora, adapters, params)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from itune.models.layers import ADAPTERS
from itune.models.model import Model
from itune.sharding import check_divisible, tree_shardings
from itune.types import InputError


@dataclasses.dataclass(frozen=True)
class Lora:
    """Settings of adapters. `targets`: a regular expression that must match a whole module name, either short (q_proj)
    or with its place in the layer (attention/q_proj, mlp/experts/up_proj). The scale is alpha / rank, with `rslora`
    alpha / sqrt(rank) (arXiv 2312.03732). `dropout` is the share of an adapter's input entries that training zeroes.
    """

    rank: int
    alpha: float = 16.0
    targets: str = r".*_proj"
    dropout: float = 0.0
    rslora: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def parameters(self, adapters: Any, params: Any) -> Any:
        """What the model reads: the parameters with the adapters beside them, `b` scaled. Copies no parameter."""
        return {**params, ADAPTERS: _map_b(lambda b: b * self.scale, adapters)}


def targets(model: Model, lora: Lora) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Path of each projection that gets an adapter -> its kernel. Raises InputError when there is none, or for a rank
    that is not lower than a kernel's sides."""
    kernels = {
        tuple(entry.key for entry in path[:-1]): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params())
        if path[-1].key == "kernel" and path[-2].key.endswith("_proj")
    }
    try:
        pattern = re.compile(lora.targets)
    except re.error as error:
        raise InputError(f"config: lora.targets {lora.targets!r} is no regular expression: {error}") from error
    found = {path: leaf for path, leaf in kernels.items() if any(map(pattern.fullmatch, names(path)))}
    if not found:
        known = sorted({names(path)[-1] for path in kernels})
        raise InputError(
            f"config: lora.targets {lora.targets!r} matches no projection; there are {', '.join(known)} "
            "(embedding, head, router and norms take no adapter)"
        )
    if lora.dropout and any("experts" in path for path in found):
        raise InputError(
            f"config: lora.dropout={lora.dropout} with adapters on experts is not supported; set lora.dropout=0 or "
            r"leave the experts out, lora.targets='attention/.*'"
        )
    for path, leaf in found.items():
        if lora.rank >= min(leaf.shape[-2:]):
            raise InputError(
                f"config: lora.rank={lora.rank} is not lower than the sides of {'/'.join(path)}, "
                f"{' x '.join(map(str, leaf.shape[-2:]))}; expected at most {min(leaf.shape[-2:]) - 1}"
            )
    return found


def names(path: tuple[str, ...]) -> tuple[str, str]:
    """The names that `targets` is compared with: q_proj and attention/q_proj of blocks/layer_0/attention/q_proj."""
    return path[-1], "/".join(path[2:] if path[0] == "blocks" else path[1:])


def abstract_adapters(model: Model, lora: Lora) -> Any:
    """The tree of jax.ShapeDtypeStruct that `init_adapters` returns."""
    tree: dict[str, Any] = {}
    for path, kernel in targets(model, lora).items():
        *stack, outs, ins = kernel.shape
        shapes = {"a": (*stack, lora.rank, ins), "b": (*stack, outs, lora.rank)}
        _put(tree, path, {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()})
    return tree


def adapter_axes(model: Model, lora: Lora) -> Any:
    """The same tree with a tuple of logical axis names a leaf: a side lies as that side of the kernel does."""
    axes, tree = model.logical_axes(), dict[str, Any]()
    for path in targets(model, lora):
        *stack, outs, ins = functools.reduce(lambda node, name: node[name], path, axes)["kernel"]
        _put(tree, path, {"a": (*stack, "rank", ins), "b": (*stack, outs, "rank")})
    return tree


def adapter_shardings(model: Model, lora: Lora) -> Any:
    """The same tree with the sharding of each leaf on the model's mesh; None without a mesh."""
    if model.mesh is None:
        return None
    axes = adapter_axes(model, lora)
    check_divisible(model.mesh, abstract_adapters(model, lora), axes)
    return tree_shardings(model.mesh, axes)


def init_adapters(model: Model, lora: Lora, rng: jax.Array) -> Any:
    """New adapters, float32: `a` uniform within 1 / sqrt(in), as peft draws it, `b` zero, so that nothing changes yet.

    The values depend on `rng` and a projection's path: not on the mesh, nor on which other projections have adapters.
    """

    def draw(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "b":
            return jnp.zeros(leaf.shape, leaf.dtype)
        key = jax.random.fold_in(rng, zlib.crc32(jax.tree_util.keystr(path, simple=True, separator="/").encode()))
        bound = 1 / math.sqrt(leaf.shape[-1])
        return jax.random.uniform(key, leaf.shape, leaf.dtype, -bound, bound)

    tree = abstract_adapters(model, lora)
    make = jax.jit(
        lambda: jax.tree_util.tree_map_with_path(draw, tree), out_shardings=adapter_shardings(model, lora)
    )
    return make()


def merge(model: Model, lora: Lora, adapters: Any, params: Any) -> Any:
    """Parameters with every adapter added to its kernel, computed in float32 and rounded to the kernel's dtype.

    Kernels without an adapter are the same arrays as in `params`.
    """
    merged = jax.tree.map(lambda leaf: leaf, params)
    for path in targets(model, lora):
        module, adapter = (functools.reduce(lambda node, name: node[name], path, tree) for tree in (merged, adapters))
        module["kernel"] = _merged(module["kernel"], adapter["a"], adapter["b"], lora.scale)
    return merged


@jax.jit
def _merged(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    update = jnp.einsum("...or,...ri->...oi", b, a, precision=jax.lax.Precision.HIGHEST)
    return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def _map_b(function: Any, adapters: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(leaf) if path[-1].key == "b" else leaf, adapters
    )


def _put(tree: dict[str, Any], path: tuple[str, ...], leaf: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = leaf
