"""Adapter folders of peft: `adapter_config.json` and `adapter_model.safetensors`, written and read.

Tensors are named as peft names them for the modules of the family's checkpoint; experts one by one, which peft joins
where newer transformers hold them in one tensor.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save

from itune.models.hf.files import DTYPES, Tensor, read_header, read_json
from itune.models.hf.plan import part_of, stack_shape, tensor_names
from itune.models.hf.read import read_slice
from itune.models.lora import Lora, abstract_adapters, adapter_shardings, targets
from itune.models.model import Model
from itune.storage.fetch import model_folder
from itune.storage.hub import ADAPTER as WEIGHTS
from itune.storage.hub import ADAPTER_CONFIG as CONFIG
from itune.types import InputError

PREFIX = "base_model.model."
SIDES = {"a": "lora_A", "b": "lora_B"}
# what makes an adapter something else than the plain LoRA that we compute
OTHER_KINDS = (
    "use_dora", "lora_bias", "fan_in_fan_out", "modules_to_save", "layers_to_transform", "alora_invocation_tokens",
    "target_parameters", "trainable_token_indices",
)  # fmt: skip
# how adapters may have begun: none of these touches the base, as pissa, olora, corda, loftq and lora_ga do
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def check_exportable(model: Model, lora: Lora) -> None:
    """Raise InputError where peft could not use these adapters."""
    dense = [path for path in _modules(model, lora) if "mlp" in path and "experts" not in path]
    if dense and any(kind.experts is not None for kind in model.config.kinds):
        raise InputError(
            f"export: this model has adapters on dense MLPs ({'/'.join(dense[0])}) and has experts elsewhere, which "
            "peft cannot hold apart; export it merged (without --adapter)"
        )


def write_adapter(
    folder: str | os.PathLike, model: Model, lora: Lora, adapters: Any, base: str, revision: str | None = None
) -> int:
    """Write adapters as a peft folder; returns the bytes of its tensors. `base`: the model that they belong to.

    On several hosts all must call this; the first one writes. Raises InputError as `check_exportable` does.
    """
    check_exportable(model, lora)
    modules = _modules(model, lora)
    names = {_short(name) for leaf in modules.values() for name in leaf}
    tensors: dict[str, np.ndarray] = {}
    for path, leaf_names in modules.items():
        adapter = functools.reduce(lambda node, name: node[name], path, adapters)
        for side, theirs in SIDES.items():
            values = _on_host(adapter[side])
            values = values.reshape(-1, *values.shape[-2:])
            for name, value in zip(leaf_names, values, strict=True):
                tensors[f"{PREFIX}{name}.{theirs}.weight"] = np.ascontiguousarray(value)
    if jax.process_index() == 0:
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        text = json.dumps(_config(lora, sorted(names), base, revision), indent=2) + "\n"
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")
    return sum(value.nbytes for value in tensors.values())


def read_adapter(folder: str | os.PathLike, model: Model, lora: Lora) -> Any:
    """The adapters of a peft folder, float32 on the model's mesh.

    Raises InputError where the folder is none, is of another kind, has other settings than `lora` or other tensors
    than `lora` and the model need: all of them listed.
    """
    folder = model_folder(str(folder), key="lora.init_from")
    if not (folder / CONFIG).is_file():
        raise InputError(f"lora.init_from: {folder} has no {CONFIG}; expected an adapter folder of peft, or its hub id")
    config = read_json(folder / CONFIG)
    _check_config(folder / CONFIG, config, lora)
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: no {WEIGHTS}; expected the adapter as safetensors (pickles are not read)")
    found, wanted = read_header(folder / WEIGHTS), _wanted(model, lora)
    problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    for name, tensor in found.items():
        if name not in wanted:
            problems.append(f"extra: {name} {list(tensor.shape)}")
        elif tensor.shape != wanted[name] or tensor.dtype not in DTYPES:
            problems.append(f"{name} is {tensor.dtype} {list(tensor.shape)}, expected {list(wanted[name])}")
    if problems:
        raise InputError(
            f"{folder}: the adapter does not fit this model with lora.targets={lora.targets!r}, {len(problems)} "
            "problems:\n  " + "\n  ".join(problems)
        )
    modules = _modules(model, lora)

    def read(path: Any, leaf: Any, sharding: Any = None) -> jax.Array:
        module = modules[tuple(entry.key for entry in path[:-1])]
        sides = [found[f"{PREFIX}{name}.{SIDES[path[-1].key]}.weight"] for name in module]
        values = np.stack([_read(tensor) for tensor in sides]).reshape(leaf.shape)
        return jax.device_put(values, sharding)

    trees = [abstract_adapters(model, lora), adapter_shardings(model, lora)]
    return jax.tree_util.tree_map_with_path(read, *(tree for tree in trees if tree is not None))


def _modules(model: Model, lora: Lora) -> dict[tuple[str, ...], list[str]]:
    """Path of each adapted projection -> names of its modules in the checkpoint, of every layer and expert.

    Raises InputError where the checkpoint has no module for one: experts that it stores in one tensor.
    """
    paths = {path: "/".join((*path, "kernel")) for path in targets(model, lora)}
    if packed := [path for path, kernel in paths.items() if part_of(model, kernel).transposed]:
        raise InputError(
            f"lora.targets: a folder of peft cannot hold adapters of {'/'.join(packed[0])}: {model.family} has all "
            "experts of a layer in one tensor; expected e.g. attention/.*, or export such a run merged (without "
            "--adapter)"
        )
    names = tensor_names(model)
    return {path: [name.removesuffix(".weight") for name in names[kernel]] for path, kernel in paths.items()}


def _wanted(model: Model, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape."""
    kernels, wanted = targets(model, lora), dict[str, tuple[int, ...]]()
    for path, modules in _modules(model, lora).items():
        kernel = kernels[path]
        outs, ins = kernel.shape[len(stack_shape(model, "/".join((*path, "kernel")), kernel)) :]
        for name in modules:
            wanted[f"{PREFIX}{name}.lora_A.weight"] = (lora.rank, ins)
            wanted[f"{PREFIX}{name}.lora_B.weight"] = (outs, lora.rank)
    return wanted


def _short(module: str) -> str:
    """self_attn.q_proj of model.layers.3.self_attn.q_proj; of an expert's projection the last part."""
    parts = module.split(".")
    last = max(i for i, part in enumerate(parts) if part.isdecimal())
    return ".".join(parts[last + 1 :])


def _config(lora: Lora, modules: list[str], base: str, revision: str | None) -> dict[str, Any]:
    alpha = int(lora.alpha) if lora.alpha.is_integer() else lora.alpha
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "revision": revision,
        "inference_mode": True,
        "r": lora.rank, "lora_alpha": alpha, "lora_dropout": lora.dropout, "use_rslora": lora.rslora,
        "target_modules": modules, "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True,
        "rank_pattern": {}, "alpha_pattern": {}, "modules_to_save": None, "layers_to_transform": None,
    }  # fmt: skip


def _check_config(file: Path, config: dict[str, Any], lora: Lora) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise InputError(f"{file}: peft_type is {kind!r}; expected 'LORA'")
    odd = [key for key in OTHER_KINDS if config.get(key)]
    odd += [key for key in ("rank_pattern", "alpha_pattern") if config.get(key)]
    odd += ["bias"] if config.get("bias", "none") != "none" else []
    if odd:
        raise InputError(f"{file}: {', '.join(f'{key}={config[key]!r}' for key in odd)} is not supported; "
                         "expected one rank and alpha for all, no biases, no further modules")
    begun = config.get("init_lora_weights", True)
    if begun not in PLAIN_STARTS:
        raise InputError(
            f"{file}: init_lora_weights is {begun!r}: this adapter belongs to a base whose weights peft changes; "
            f"expected one of {', '.join(map(str, PLAIN_STARTS))}: save it with peft's "
            "path_initial_model_for_weight_conversion, or save the merged model"
        )
    theirs = {
        "lora.rank": config.get("r"), "lora.alpha": config.get("lora_alpha"),
        "lora.rslora": bool(config.get("use_rslora", False)),
    }  # fmt: skip
    ours = {"lora.rank": lora.rank, "lora.alpha": lora.alpha, "lora.rslora": lora.rslora}
    wrong = [f"{key} is {ours[key]} here and {theirs[key]} there" for key in ours if ours[key] != theirs[key]]
    if wrong:
        settings = " ".join(f"--config.{key}={value}" for key, value in theirs.items())
        raise InputError(f"{file}: {'; '.join(wrong)}; to continue this adapter set {settings}")


def _read(tensor: Tensor) -> np.ndarray:
    values = np.empty(tensor.shape, np.float32)
    read_slice(tensor, [slice(0, size) for size in tensor.shape], values)
    return values


def _on_host(leaf: jax.Array) -> np.ndarray:
    if not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)
