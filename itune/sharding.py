"""Meshes and the one table from logical axes to mesh axes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from itune.types import InputError

MESH_AXES = ("data", "fsdp", "expert", "context", "tensor")
DCN_AXES = ("dcn_data", "dcn_fsdp")  # parts of data and fsdp that run over slices

# logical axis -> mesh axes. A logical axis that does not stand here is an error.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "expert": ("expert",),
    "experts": ("expert", "fsdp"),  # where there are enough of them: see expert_axes
    "vocab": ("tensor",),
    "layers": (),
    "norm": (),
    "rank": (),
    "whole": (),
}


def mesh_sizes(shape: Mapping[str, int] | None, devices: int) -> dict[str, int]:
    """Axis -> size inside a slice, and "dcn_data", "dcn_fsdp": slices that an axis spans besides.

    One axis may be -1: it takes the devices that the others leave. Without `shape` every device goes to `fsdp`.
    Raises InputError when the product is not the number of devices.
    """
    sizes = dict.fromkeys((*MESH_AXES, *DCN_AXES), 1)
    sizes.update(shape if shape is not None else {"fsdp": -1})
    unknown = set(sizes) - {*MESH_AXES, *DCN_AXES}
    if unknown:
        raise InputError(f"mesh: unknown axis {sorted(unknown)}; axes are {', '.join((*MESH_AXES, *DCN_AXES))}")
    if wrong := [axis for axis, size in sizes.items() if size < 1 and size != -1]:
        raise InputError(f"mesh.{wrong[0]}={sizes[wrong[0]]}: expected at least 1, or -1 for what the others leave")
    inferred = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if len(inferred) > 1:
        raise InputError(f"mesh: only one axis may be -1, found {', '.join(inferred)}")
    if inferred and devices % known == 0:
        sizes[inferred[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        raise InputError(
            f"mesh: {describe_sizes(sizes)} does not fit {devices} devices; make the product {devices}, "
            "or give one axis -1 to let it take what the others leave"
        )
    return sizes


def describe_sizes(sizes: Mapping[str, int]) -> str:
    """data=2 x fsdp=4"""
    return " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "one device"


def axis_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Axis -> size over all slices, of what `mesh_sizes` gives."""
    return {axis: sizes[axis] * sizes.get(f"dcn_{axis}", 1) for axis in MESH_AXES}


def make_mesh(shape: Mapping[str, int] | None = None, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh over all axes of `MESH_AXES`, of the sizes that `mesh_sizes` gives.

    With `dcn_data` or `dcn_fsdp` above 1 the outer part of that axis runs over slices (the network between them is
    slow), everything else stays inside one. Raises InputError when sizes, devices and slices do not fit together.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = mesh_sizes(shape, len(devices))
    outer = [sizes[axis] for axis in DCN_AXES]
    grid = np.asarray(_by_slice(devices, math.prod(outer))).reshape([*outer, *(sizes[axis] for axis in MESH_AXES)])
    # (slices of data, slices of fsdp, data, fsdp, ...) -> each axis outside its inner part
    grid = grid.transpose(0, 2, 1, 3, *range(4, grid.ndim)).reshape(list(axis_sizes(sizes).values()))
    return Mesh(grid, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(MESH_AXES))


def _by_slice(devices: list[Any], wanted: int) -> list[Any]:
    """The devices ordered by slice. Raises InputError where they lie in another number of slices than `wanted`.

    Devices that know of no slices (CPUs, GPUs) are cut into equal groups in their order: by host.
    """
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if wanted > 1 and len(slices) not in (1, wanted):
        raise InputError(
            f"mesh: dcn_data x dcn_fsdp is {wanted}, the devices lie in {len(slices)} slices; make it {len(slices)}"
        )
    return sorted(devices, key=lambda device: getattr(device, "slice_index", 0)) if wanted > 1 else devices


def spec(logical: Sequence[str | None]) -> PartitionSpec:
    """The PartitionSpec of an array whose axes have these logical names (None: replicated)."""
    parts: list[Any] = []
    for name in logical:
        if name is not None and name not in RULES:
            raise KeyError(f"logical axis {name!r} is not in sharding.RULES; it has {', '.join(RULES)}")
        axes = RULES[name] if name is not None else ()
        parts.append(None if not axes else axes[0] if len(axes) == 1 else axes)
    return PartitionSpec(*parts)


def named(mesh: Mesh, logical: Sequence[str | None]) -> NamedSharding:
    """The NamedSharding on `mesh` for logical axis names."""
    return NamedSharding(mesh, spec(logical))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def tree_shardings(mesh: Mesh, logical_tree: Any) -> Any:
    """A tree of NamedShardings from a tree whose leaves are tuples of logical names."""
    return jax.tree.map(lambda names: named(mesh, names), logical_tree, is_leaf=lambda x: isinstance(x, tuple))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp, length over context: the layout of every `_BL` array."""
    return named(mesh, ("batch", "length"))


def platform(mesh: Mesh | None) -> str:
    """Of the devices that a program runs on: cpu, gpu or tpu. Those of a mesh need not exist on this machine."""
    return str(mesh.devices.flat[0].platform if mesh is not None else jax.default_backend())


def stands_in(mesh: Mesh) -> bool:
    """Whether its devices are not there: they can be compiled for, nothing can run on them."""
    device = mesh.devices.flat[0]
    try:
        return device not in jax.devices(device.platform)
    except RuntimeError:  # no such platform here
        return True


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is one CPU device, where a program may branch and copy as no accelerator would want to."""
    return mesh.size == 1 and platform(mesh) == "cpu"


def rows_divisor(mesh: Mesh) -> int:
    """The number that a batch's rows must be divisible by."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def expert_axes(mesh: Mesh | None, count: int, axes: Sequence[str]) -> tuple[str, ...]:
    """Logical axes of a stack over `count` experts, of the `axes` that one expert's array has.

    fsdp divides the experts, not their sides, where it can: a device gathers whole kernels, adapters without a side
    over fsdp are divided too, and no side of a shard is narrower than what a chip pads it to.
    """
    if mesh is None or mesh.shape["fsdp"] == 1 or count % axis_size(mesh, "experts"):
        return ("expert", *axes)
    return ("experts", *("whole" if RULES[name] == ("fsdp",) else name for name in axes))


def constrain(x: jax.Array, mesh: Mesh | None, logical: Sequence[str | None]) -> jax.Array:
    """`x` laid out by its logical axes; a dimension that its mesh axes do not divide stays whole on every device.

    For activations and caches, whose sizes a caller may choose freely. Without a mesh nothing happens.
    """
    if mesh is None:
        return x
    fits = [name is not None and size % axis_size(mesh, name) == 0 for size, name in zip(x.shape, logical, strict=True)]
    names = [name if fit else None for name, fit in zip(logical, fits, strict=True)]
    return jax.lax.with_sharding_constraint(x, named(mesh, names))


def axis_size(mesh: Mesh, logical: str) -> int:
    """The number of shards that a logical axis is cut into."""
    return math.prod(mesh.shape[axis] for axis in RULES[logical])


def check_divisible(mesh: Mesh, abstract: Any, logical_tree: Any) -> None:
    """InputError when a parameter's dimension is not a multiple of its mesh axes: names it and the nearest choice."""
    problems: dict[tuple, str] = {}

    def check(path: tuple, leaf: Any, names: tuple[str, ...]) -> None:
        for dimension, (size, name) in enumerate(zip(leaf.shape, names, strict=True)):
            shards = axis_size(mesh, name)
            if size % shards:
                axes = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in RULES[name])
                choices = [n for n in range(1, shards) if size % n == 0]
                where = jax.tree_util.keystr(path, simple=True, separator="/")
                problem = f"{where}: dimension {dimension} ({name}, {size}) is not a multiple of {axes}"
                problems.setdefault((size, name), f"{problem}; the nearest that divides it is {choices[-1]}")

    jax.tree_util.tree_map_with_path(check, abstract, logical_tree, is_leaf=lambda x: isinstance(x, tuple))
    if problems:
        raise InputError("mesh: parameters do not divide over the mesh:\n  " + "\n  ".join(problems.values()))
