"""Mixture of experts: every token reaches all the experts it chose (no capacity, nothing dropped).

Tokens are sorted by expert, and each expert multiplies its own rows (`ragged.py`). On a mesh the expert axis
holds disjoint experts: a device computes those of its rows that chose its experts, and the sums of the devices are
added.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from itune.models.architecture import Experts, ModelConfig
from itune.models.balance import BALANCE, balance_sums
from itune.models.entrywise import gated
from itune.models.groups import sort
from itune.models.layers import ACTIVATIONS, ADAPTERS, AXES, linear
from itune.models.ragged import ragged_linear, whole
from itune.models.remat import keep
from itune.sharding import RULES, axis_size, expert_axes, platform, rows_divisor, spec


class Stack(nn.Module):
    """A projection of every expert: kernel (E, out, in), bias (E, out) where there is one, and where there is an
    adapter its a (E, rank, in) and b (E, out, rank)."""

    count: int
    out: int
    bias: bool
    init_std: float
    param_dtype: str

    @nn.compact
    def __call__(self, width: int) -> dict[str, jax.Array]:
        shape = (self.count, self.out, width)
        weights = {"kernel": self.param("kernel", nn.initializers.normal(self.init_std), shape, self.param_dtype)}
        if self.bias:
            weights["bias"] = self.param("bias", nn.initializers.zeros, shape[:2], self.param_dtype)
        if self.has_variable(ADAPTERS, "a"):
            weights |= {name: self.get_variable(ADAPTERS, name) for name in ("a", "b")}
        return weights


class Stacks(nn.Module):
    """The projections of all experts."""

    config: ModelConfig
    experts: Experts
    param_dtype: str

    @nn.compact
    def __call__(self) -> dict[str, dict[str, jax.Array]]:
        c, e = self.config, self.experts
        sizes = {"gate_proj": (e.width, c.width), "up_proj": (e.width, c.width), "down_proj": (c.width, e.width)}
        return {
            name: Stack(e.count, out, e.biases, c.init_std, self.param_dtype, name=name)(width)
            for name, (out, width) in sizes.items()
        }


class MoE(nn.Module):
    """sum over the chosen experts of weight * expert(x). Router logits, weights and the sum are float32."""

    config: ModelConfig
    experts: Experts
    dtype: str
    param_dtype: str
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x_BLD: jax.Array, segments_BL: jax.Array) -> jax.Array:
        e = self.experts
        logits_BLE = Router(self.config, e, self.param_dtype, name="router")(x_BLD)
        chosen_BLC, weights_BLC = route(e, logits_BLE)
        if self.is_mutable_collection(BALANCE):
            self.sow(BALANCE, "sums", balance_sums(logits_BLE, chosen_BLC, segments_BL), reduce_fn=lambda _, sums: sums)
        stacks = Stacks(self.config, e, self.param_dtype, name="experts")()
        batch = {"tpu": 0, "cpu": 4}.get(platform(self.mesh), e.count)  # a GPU is only full with many tiles
        run = functools.partial(mix, e, ACTIVATIONS[self.config.activation], batch=batch)
        if self.mesh is None or self.mesh.size == 1:
            return run((), x_BLD, chosen_BLC, weights_BLC, stacks).astype(self.dtype)
        rows = PartitionSpec(
            *(
                part if size % count == 0 else None
                for part, size, count in zip(
                    spec(("batch", "length")),
                    x_BLD.shape,
                    (rows_divisor(self.mesh), axis_size(self.mesh, "length")),
                    strict=False,
                )
            )
        )
        axes = {name: {part: _axes(self.mesh, e, name, part) for part in stack} for name, stack in stacks.items()}
        specs, cuts = (jax.tree.map(of, axes, is_leaf=lambda x: isinstance(x, tuple)) for of in (spec, _cut))
        inner = jax.shard_map(
            functools.partial(run, ("expert", "tensor"), cuts=cuts),
            mesh=self.mesh,
            in_specs=(rows, rows, rows, specs),
            out_specs=rows,
            check_vma=False,
        )
        return inner(x_BLD, chosen_BLC, weights_BLC, stacks).astype(self.dtype)


class Router(nn.Module):
    """float32 logits (B, L, E) of each token for each expert."""

    config: ModelConfig
    experts: Experts
    param_dtype: str

    @nn.compact
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        c, e = self.config, self.experts
        kernel = self.param("kernel", nn.initializers.normal(c.init_std), (e.count, c.width), self.param_dtype)
        logits_BLE = linear(x_BLD, kernel, "float32")
        if e.biases:
            bias = self.param("bias", nn.initializers.zeros, (e.count,), self.param_dtype)
            logits_BLE = logits_BLE + bias.astype(jnp.float32)
        return keep(logits_BLE)


def route(e: Experts, logits_BLE: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The chosen experts (B, L, C) int32 and their weights (B, L, C) float32."""
    if e.softmax_chosen:
        best_BLC, chosen_BLC = jax.lax.top_k(logits_BLE, e.chosen)
        return chosen_BLC, jax.nn.softmax(best_BLC, axis=-1)
    weights_BLC, chosen_BLC = jax.lax.top_k(jax.nn.softmax(logits_BLE, axis=-1), e.chosen)
    if e.normalise:
        weights_BLC = weights_BLC / weights_BLC.sum(axis=-1, keepdims=True)
    return chosen_BLC, weights_BLC


def mix(
    e: Experts,
    activation: Any,
    axes: tuple[str, ...],
    x_BLD: jax.Array,
    chosen_BLC: jax.Array,
    weights_BLC: jax.Array,
    stacks: dict[str, dict[str, jax.Array]],
    cuts: dict[str, dict[str, int | None]] | None = None,
    batch: int = 4,
) -> jax.Array:
    """What the experts add, float32 (B, L, D), computed in x's dtype. `batch`: see `groups.sort`.

    With `axes`, ("expert", "tensor") inside a shard_map, `stacks` are this device's experts and its part of their
    width, of which fsdp divides the dimensions `cuts` further.
    """
    x_TD, chosen_S, weights_S = x_BLD.reshape(-1, x_BLD.shape[-1]), chosen_BLC.reshape(-1), weights_BLC.reshape(-1)
    count = e.count // jax.lax.axis_size("expert") if axes else e.count
    first = jax.lax.axis_index("expert") * count if axes else 0
    own_S = jnp.where((chosen_S >= first) & (chosen_S < first + count), chosen_S - first, count)
    # a token stands here once for each expert it chose, at places sorted by expert
    row_P, expert_P, groups = sort(own_S, count, batch, e.count // count)
    token_P, mine_P1 = row_P // e.chosen, (expert_P < count)[:, None]

    def project(name: str, rows: jax.Array, complete: bool = True) -> jax.Array:
        stack, cut = stacks[name], cuts[name] if cuts else dict.fromkeys(stacks[name])

        def ragged(rows: jax.Array, part: str) -> jax.Array:
            return ragged_linear(rows, stack[part], groups, x_BLD.dtype, cut[part])

        y = ragged(rows, "kernel")
        if "a" in stack:  # linear: where `rows` is a part of the width, so is this product, and the psum adds up both
            y = y + ragged(keep(ragged(rows, "a")), "b")
        if "bias" in stack:
            bias = whole(cut["bias"], stack["bias"].astype(jnp.float32))  # whose gradient is a sum over rows
            bias = bias[jnp.minimum(expert_P, count - 1)].astype(y.dtype)
            y = y + (bias if complete else jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0))
        return keep(jnp.where(mine_P1, y, 0))

    taken: Any = {"mode": "fill", "fill_value": 0} if batch else {}  # with tiles there are places without a row
    rows_PD = x_TD.at[token_P].get(**taken)
    gate_PF, up_PF = project("gate_proj", rows_PD), project("up_proj", rows_PD)
    if e.clamp is None:
        gated_PF = gated(activation, gate_PF, up_PF)
    else:
        alpha, limit = e.clamp
        gate_PF, up_PF = jnp.minimum(gate_PF, limit), jnp.clip(up_PF, -limit, limit)
        gated_PF = gate_PF * jax.nn.sigmoid(alpha * gate_PF) * (up_PF + 1)
    weights_P1 = weights_S.at[row_P].get(**taken)[:, None]
    out_PD = project("down_proj", gated_PF, complete=not axes).astype(jnp.float32) * weights_P1
    out_TD = jnp.zeros(x_TD.shape, jnp.float32).at[token_P].add(out_PD, mode="drop")
    return (jax.lax.psum(out_TD, axes) if axes else out_TD).reshape(x_BLD.shape)


def _axes(mesh: Mesh, e: Experts, name: str, part: str) -> tuple[str, ...]:
    """Logical axes of what `Stack` gives, as `Model.logical_axes` and `lora.adapter_axes` lay them out."""
    if part == "bias":
        return expert_axes(mesh, e.count, AXES[name, part])
    out, into = AXES[name, "kernel"]
    return expert_axes(mesh, e.count, {"kernel": (out, into), "a": ("rank", into), "b": (out, "rank")}[part])


def _cut(names: tuple[str, ...]) -> int | None:
    """The dimension that fsdp divides."""
    return next((place for place, name in enumerate(names) if "fsdp" in RULES[name]), None)
