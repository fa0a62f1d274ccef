"""A run's arrays on a mesh of any size, without devices: how many bytes of each lie on one device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from itune.config import Config
from itune.models import Model, load_model
from itune.objectives.sft import make_sft
from itune.optim import make_optimizer
from itune.sharding import MESH_AXES, axis_sizes, mesh_sizes
from itune.step import abstract_state, check_batch
from itune.types import Batch, InputError

_ENDS = ("embed", "lm_head", "final_norm")  # parameters that are of no layer


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the formulas read. `parameters`, `optimizer`: bytes on a device; `trained`: parameters a device trains.

    `trained_layers`: share of the layers' parameters that train themselves, `head_trains`: whether the head's kernel
    does (of a run with adapters 0 and no), `through`: whether gradients go back through the layers. `tokens`: of one
    micro-batch on one device. `sizes`: axis -> devices over all slices; `dcn`: axis -> slices that it spans.
    """

    config: Config
    model: Any
    sizes: Mapping[str, int]
    dcn: Mapping[str, int]
    parameters: int
    optimizer: int
    trained: int
    trained_layers: float
    head_trains: bool
    through: bool
    tokens: int

    @property
    def devices(self) -> int:
        return math.prod(self.sizes.values())

    @property
    def width_bytes(self) -> int:
        """Bytes of one number in the compute dtype."""
        return 2 if self.config.model.compute_dtype == "bfloat16" else 4


def lay_out(config: Config, devices: int, vocab_size: int | None = None, slices: int = 1) -> Layout:
    """The run that `config` describes on so many devices. Raises InputError where it cannot be cut that way."""
    from itune.setup_run import make_tuning  # which imports this floor's check

    sizes = axis_sizes(mesh_sizes(dataclasses.asdict(config.mesh), devices))
    mesh: Any = AbstractMesh(tuple(sizes.values()), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))
    rows, length = config.train.batch_size, config.data.max_length
    check_batch(Batch(*[jax.ShapeDtypeStruct((rows, length), "int32")] * 5), mesh, config.train.accumulation)
    section = config.model
    model = load_model(
        section.path, None, section.param_dtype, revision=section.revision or None, vocab_size=vocab_size,
        compute_dtype=section.compute_dtype, remat=config.train.remat,
    )  # with any attention: kernels are there or not on the devices that are planned for
    model = OnPaper(**{field.name: getattr(model, field.name) for field in dataclasses.fields(model)} | {"mesh": mesh})
    if model.config.num_heads % sizes["tensor"]:
        raise InputError(f"mesh.tensor={sizes['tensor']} does not divide the model's {model.config.num_heads} heads")
    loss = config.loss
    make_sft(model, loss.weighting, loss.chunk, blocks=loss.blocks, router_aux=loss.router_aux)  # for what it refuses
    trainable, frozen = make_tuning(config, model).abstract()
    optimizer = make_optimizer(config.optimizer, 1)
    state = abstract_state(model, optimizer, mesh, trainable=trainable, frozen=frozen)
    return dataclasses.replace(layout_of(config, model, sizes, state), dcn=_spanned(config, sizes, slices))


def slices_said(config: Config) -> dict[str, int]:
    """Axis -> slices, as the config says."""
    return {axis: getattr(config.mesh, f"dcn_{axis}") for axis in ("data", "fsdp")}


def _spanned(config: Config, sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Axis -> slices that it spans: as mesh.dcn_* says, or where that says nothing, as devices lie in their order."""
    said = slices_said(config)
    if (product := math.prod(said.values())) == slices:
        return said
    if product > 1:
        raise InputError(f"mesh: dcn_data x dcn_fsdp is {product}, the devices lie in {slices} slices; "
                         f"make it {slices}")
    data = math.gcd(sizes["data"], slices)
    if sizes["fsdp"] % (slices // data):
        raise InputError(f"{slices} slices cut through an axis of the mesh that they cannot share; set mesh.dcn_data "
                         f"or mesh.dcn_fsdp to {slices}")
    return {"data": data, "fsdp": slices // data}


class OnPaper(Model):
    """A model on a mesh without devices. Its shapes are those without a mesh: nothing may look for a device."""

    def abstract_params(self) -> Any:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return Model(**fields | {"mesh": None}).abstract_params()


def layout_of(config: Config, model: Any, sizes: Mapping[str, int], state: Any) -> Layout:
    """The same from a run's own model and abstract state. `sizes`: axis -> devices over all slices, as a mesh has."""
    groups = sizes["data"] * sizes["fsdp"] * sizes["context"] * config.train.accumulation
    whole = not config.lora.rank
    trained, all_of_them = (_layer_parameters(tree) for tree in (state.trainable, [state.trainable, state.frozen]))
    head = state.trainable.get("embed" if model.config.tie_embeddings else "lm_head")
    return Layout(
        config, model, sizes, slices_said(config),
        parameters=device_bytes(state.trainable) + device_bytes(state.frozen),
        optimizer=device_bytes(state.opt_state),
        trained=sum(_elements(leaf) for leaf in jax.tree.leaves(state.trainable)),
        trained_layers=trained / all_of_them if whole and all_of_them else 0.0, head_trains=whole and bool(head),
        through=any(name not in ("lm_head", "final_norm") for name, part in state.trainable.items() if part),
        tokens=config.train.batch_size * config.data.max_length // groups,
    )


def _layer_parameters(tree: Any) -> int:
    """Parameters of all layers in a tree of a model's parameters, or in a list of such."""
    trees = tree if isinstance(tree, list) else [tree]
    parts = [part for each in trees for name, part in (each or {}).items() if name not in _ENDS]
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parts))


def device_bytes(tree: Any) -> int:
    """Bytes on one device of a tree of arrays, or ShapeDtypeStructs, with shardings."""
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _elements(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def layer_elements(model: Any, tensor: int = 1, expert: int = 1) -> tuple[int, int]:
    """Entries of the kernels of one average layer where fsdp has gathered them, and of the largest.

    The experts' kernels of one projection are one.
    """
    whole = largest = 0.0
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.abstract_params()):
        names = [entry.key for entry in path]
        if names[0] in _ENDS:
            continue
        elements = math.prod(leaf.shape) / tensor / (expert if "experts" in names else 1)
        whole += elements
        largest = max(largest, elements / (leaf.shape[0] if names[0] == "blocks" else 1))
    return int(whole / model.config.num_layers), int(largest)
