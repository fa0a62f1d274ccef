"""A checkpoint folder on disk: where it is, its config, and the headers of its safetensors files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from itune.storage.fetch import model_folder
from itune.storage.hub import ADAPTER_CONFIG, INDEX, SINGLE
from itune.types import InputError

DTYPES: dict[str, Any] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
MAX_HEADER = 100 << 20  # bytes, the limit of the safetensors library


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: its dtype as safetensors names it, and the bytes it takes, counted from the file's start.

    scales: of an MXFP4 tensor, whose shape is that of the unpacked one; see mxfp4.py.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int
    scales: Tensor | None = None


def find_folder(path_or_repo: str | os.PathLike, revision: str | None = None, weights: bool = True) -> Path:
    """The folder of a checkpoint: a local one, or the copy of a bucket's or a hub id's (JSON, tokenizer, `weights`)."""
    return model_folder(str(path_or_repo), revision, weights=weights)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object, or InputError with the line that does not parse."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:  # also: not UTF-8, thousands of digits, endless nesting
        raise InputError(f"{file}: not JSON: {error}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json."""
    file = folder / "config.json"
    if not file.is_file():
        if (folder / ADAPTER_CONFIG).is_file():
            raise InputError(f"{folder}: is an adapter of peft, not a model: start from it with lora.init_from and its "
                             "base as model.path, or export the run that made it merged")
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise InputError(f"{folder}: no config.json; expected a Hugging Face model folder, found {found}")
    hf = read_json(_inside(folder, file.name, folder))
    if hf.get("quantization_config"):
        packed = hf["quantization_config"]
        method = packed.get("quant_method", "unknown method") if isinstance(packed, dict) else packed
        if method != "mxfp4":
            raise InputError(
                f"{file}: the weights are quantized ({method}); expected float32, bfloat16, float16 or mxfp4 weights"
            )
    return hf


def weight_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The safetensors files of a folder, and the index (tensor -> file name) of a sharded one."""
    if (folder / INDEX).exists():
        index = read_json(_inside(folder, INDEX, folder)).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(v, str) for v in index.values()):
            raise InputError(f"{folder / INDEX}: expected an object weight_map of tensor -> file name")
        names = sorted(set(index.values()))
        files = [_inside(folder, name, folder / INDEX) for name in names]
        if others := [name for name in names if not name.endswith(".safetensors")]:
            raise InputError(f"{folder / INDEX}: names {', '.join(others[:3])}; expected .safetensors files only")
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            here = ", ".join(sorted(p.name for p in folder.glob("*.safetensors"))) or "none"
            raise InputError(
                f"{folder / INDEX}: names {', '.join(missing)}, which the folder lacks; safetensors files there: {here}"
            )
        return files, index
    if (folder / SINGLE).exists():
        return [_inside(folder, SINGLE, folder)], None
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder}: weights only as pickle ({', '.join(pickles[:3])}), which can run code when it is read; "
            "convert them where you trust it: AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER)"
        )
    raise InputError(f"{folder}: no {SINGLE} and no {INDEX}; expected one of them")


def _inside(folder: Path, name: str, where: Path) -> Path:
    """The path of a file of this folder. Names and links out of it are refused, save the hub cache's."""
    if name != os.path.basename(name) or name in ("", ".", ".."):
        raise InputError(f"{where}: file name {name!r} leads out of the folder; expected a plain file name")
    try:
        real, home = (folder / name).resolve(), folder.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a name that no file can have
        raise InputError(f"{where}: file name {name!r} cannot be followed: {error}") from error
    allowed = [home]
    if home.parent.name == "snapshots":  # in the hub's cache a snapshot links to its repository's blobs
        allowed.append(home.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise InputError(f"{folder / name}: is a link to {real}, outside the folder; copy the file into it")
    return folder / name


def read_header(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, from its header alone; a truncated or malformed file is an InputError."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise InputError(f"{file}: not a safetensors file, or cut short: {size} bytes, header of {length}")
        try:
            header = json.loads(stream.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            tensors = {name: _tensor(name, file, entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{file}: malformed safetensors header: {type(error).__name__}: {error}") from error
    for tensor in tensors.values():
        if not 8 + length <= tensor.start <= tensor.stop <= size:
            raise InputError(
                f"{file}: {tensor.name} ends at byte {tensor.stop} but the file has {size}: cut short; copy it again"
            )
    return tensors


def _tensor(name: str, file: Path, entry: dict[str, Any], base: int) -> Tensor:
    start, stop = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    dtype = DTYPES.get(entry["dtype"])
    if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {stop - start} bytes for shape {shape} of {entry['dtype']}")
    return Tensor(name, file, str(entry["dtype"]), shape, base + start, base + stop)
