"""Write a Hugging Face folder: weights in shards with an index, and config.json. It is there whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

from itune.models.families import FAMILIES
from itune.models.families.common import Fields
from itune.models.families.stored import Part
from itune.models.hf.files import DTYPES, INDEX, SINGLE, Tensor, find_folder, read_config
from itune.models.hf.mxfp4 import MXFP4
from itune.models.hf.plan import EMBEDDING, Plan, leaf_paths, make_plan, part_of, stack_shape, tensor_names
from itune.models.model import Model
from itune.types import InputError, RunError

NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_pretrained(
    folder: str | os.PathLike,
    model: Model,
    params: Any,
    *,
    source: str | os.PathLike | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_bytes: float = 5e9,
) -> dict[str, str]:
    """Write weights, index and config.json of a trained model to a new folder.

    `source` is the checkpoint that the model was loaded from: its config.json is passed through in its own spelling
    with only what changed, each tensor keeps its dtype there (bfloat16 for MXFP4) unless `dtype` is given, and tensors
    that the model does not use are copied. Without a source the config is written in the newer spelling, and tensors in
    `dtype` or the parameters' own. One tensor at a time is in host memory. On several hosts all must call this; the
    first one writes. Returns the SHA-256 of each tensor's bytes (on the first host).
    Raises InputError when the folder exists and is not empty, RunError when the disk fails; then nothing is left.
    """
    folder = Path(folder)
    check_shard_size(max_shard_bytes)
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not empty; expected a new folder")
    origin = None if source is None else find_folder(source, revision)
    hf = None if origin is None else read_config(origin)
    plan = None if origin is None or hf is None else make_plan(origin, model, _vocab(origin, hf))
    outputs = _outputs(model, params, plan, dtype)
    shards = _shards(outputs, max_shard_bytes)
    with _whole(folder) as staging:
        hashes: dict[str, str] = {}
        for name, tensors in shards.items():
            hashes |= _write_shard(staging and staging / name, tensors)
        if staging:
            if len(shards) > 1:
                _write_file(staging / INDEX, _index(shards))
            config = _config(model, hf, dtype)
            unchanged = origin is not None and config == hf
            text = (origin / "config.json").read_bytes() if origin and unchanged else _json(config)
            _write_file(staging / "config.json", text)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")  # no host goes on before the folder is there
    return hashes


def _vocab(origin: Path, hf: dict[str, Any]) -> int:
    return Fields(hf, str(origin / "config.json")).count("vocab_size")


class Output:
    """A tensor to write: its name, shape and dtype, and where its values come from: a tensor of the source, or for
    each part of it a parameter and a place in its stack."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: str, copy: Tensor | None = None):
        self.name, self.shape, self.dtype, self.copy = name, shape, dtype, copy
        self.parts: list[tuple[Part, jax.Array, tuple[int, ...]]] = []
        if copy is not None:
            self.bytes = copy.stop - copy.start
        else:
            self.bytes = int(np.prod(shape)) * DTYPES[dtype].itemsize

    def read(self) -> np.ndarray:
        """The values as flat bytes, on the host."""
        if self.copy is not None:
            return np.fromfile(self.copy.file, np.uint8, self.bytes, offset=self.copy.start)
        values = [_whole_on_host(_take(leaf, place, DTYPES[self.dtype].name)) for _, leaf, place in self.parts]
        if len(values) == 1 and not self.parts[0][0].transposed:
            return np.ascontiguousarray(values[0]).reshape(-1).view(np.uint8)
        stored = np.empty(self.shape, DTYPES[self.dtype])
        for (part, *_), value in zip(self.parts, values, strict=True):
            stored[..., part.first :: part.step] = value.swapaxes(-1, -2) if part.transposed else value
        return stored.reshape(-1).view(np.uint8)


def _whole_on_host(values: jax.Array) -> np.ndarray:
    if not values.is_fully_addressable:
        values = multihost_utils.process_allgather(values, tiled=True)
    return np.asarray(values)


@functools.partial(jax.jit, static_argnums=2)
def _take(leaf: jax.Array, place: tuple[int, ...], dtype: str) -> jax.Array:
    """The layer, or expert of a layer, at `place` of a stacked parameter."""
    for index in place:
        leaf = jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False)
    return leaf.astype(dtype)


def _outputs(model: Model, params: Any, plan: Plan | None, dtype: str | None) -> list[Output]:
    """Every tensor of the folder, in the order of the names."""
    leaves = leaf_paths(params)
    wanted = NAMES[np.dtype(getattr(ml_dtypes, dtype, dtype))] if dtype else None
    outputs: dict[str, Output] = {}

    def add(name: str, dtype: str, part: Part, leaf: jax.Array, place: tuple[int, ...]) -> None:
        dtype = wanted or ("BF16" if dtype == MXFP4 else dtype)
        output = outputs.setdefault(name, Output(name, part.shape(leaf.shape[len(place) :]), dtype))
        output.parts.append((part, leaf, place))

    for path, names in tensor_names(model).items():
        leaf = leaves[path]
        stack = stack_shape(model, path, leaf)
        for i, (name, place) in enumerate(zip(names, np.ndindex(*stack), strict=True)):
            kept = plan.leaves[path][i].dtype if plan else NAMES[np.dtype(leaf.dtype)]
            add(name, kept, part_of(model, path), leaf, place)
    if plan and plan.tied_head:
        add(plan.tied_head.name, plan.tied_head.dtype, Part(plan.tied_head.name), leaves[EMBEDDING], ())
    for tensor in plan.ignored if plan else ():
        outputs[tensor.name] = Output(tensor.name, tensor.shape, tensor.dtype, tensor)
    return sorted(outputs.values(), key=lambda output: output.name)


def check_shard_size(limit: float) -> None:
    """Raise InputError for a size of weight files that none can have."""
    if not limit > 0:
        raise InputError(f"largest weight file (--shard-gb): found {limit / 1e9:g} GB; expected more than 0")


def _shards(outputs: list[Output], limit: float) -> dict[str, list[Output]]:
    """File name -> its tensors, in order, each file at most `limit` bytes unless one tensor is larger."""
    groups: list[list[Output]] = [[]]
    size = 0
    for output in outputs:
        if groups[-1] and size + output.bytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(output)
        size += output.bytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": group for i, group in enumerate(groups, 1)}


def _write_shard(file: Path | None, tensors: list[Output]) -> dict[str, str]:
    """A safetensors file, one tensor in memory at a time; the tensors' hashes. Without a file (not the first host) only
    gather."""
    # wide dtypes first keeps every tensor aligned to its width, as the safetensors library does
    tensors = sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize if t.dtype in DTYPES else 0)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses a file without it
    position = 0
    for tensor in tensors:
        offsets = [position, position + tensor.bytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        position += tensor.bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with open(file, "wb") if file else contextlib.nullcontext() as stream:
        if stream:
            stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            values = tensor.read()
            if stream:
                hashes[tensor.name] = hashlib.sha256(values.data).hexdigest()
                stream.write(values.data)
        if stream:
            _sync(stream)
    return hashes


def _index(shards: dict[str, list[Output]]) -> bytes:
    total = sum(tensor.bytes for tensors in shards.values() for tensor in tensors)
    places = {tensor.name: file for file, tensors in shards.items() for tensor in tensors}
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))})


def _config(model: Model, hf: dict[str, Any] | None, dtype: str | None) -> dict[str, Any]:
    """The source's config with what changed; without a source a new one."""
    if hf is None:
        return FAMILIES[model.family].config_to_hf(model.config) | {"dtype": dtype or model.param_dtype}
    changed = dict(hf)
    if changed.pop("quantization_config", None) and not {"dtype", "torch_dtype"} & set(hf):
        changed["dtype"] = "bfloat16"  # what packed weights are written in
    if model.config.vocab_size != hf["vocab_size"]:
        changed["vocab_size"] = model.config.vocab_size
    if dtype:
        changed |= dict.fromkeys({"dtype", "torch_dtype"} & set(hf) or {"dtype"}, dtype)
    return changed


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _write_file(file: Path, content: bytes) -> None:
    with open(file, "wb") as stream:
        stream.write(content)
        _sync(stream)


def _sync(stream: Any) -> None:
    stream.flush()
    os.fsync(stream.fileno())


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[Path | None]:
    """A staging folder beside `folder` that takes its name when all went well, and is removed otherwise.

    None on hosts other than the first.
    """
    if jax.process_index() != 0:
        yield None
        return
    staging = folder.parent / f".{folder.name}.{os.getpid()}.partial"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging.mkdir()
        yield staging
        _sync_folder(staging)
        os.replace(staging, folder)
        _sync_folder(folder.parent)
    except OSError as error:
        raise disk_error(folder, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def disk_error(folder: Path, error: OSError) -> RunError:
    """What a folder that could not be written ends with."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder.parent).free
        return RunError(f"{folder}: the disk is full ({free} bytes free); free some space or choose another folder")
    return RunError(f"{folder}: could not be written: {error}")


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
