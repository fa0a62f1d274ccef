"""SHA-256 of an exported folder's files and tensors: taken from what is on disk, compared with what was written."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from itune.models.hf.files import Tensor, read_header, read_json, weight_files
from itune.types import RunError

PROOF = "itune_proof.json"
MORE_TEMPLATES = "additional_chat_templates"  # a folder of chat templates with names, as transformers writes it
CHUNK = 8 << 20


def file_hashes(folder: Path) -> dict[str, str]:
    """File name -> hash, of all files but the proof."""
    inside = sorted([*folder.iterdir(), *folder.glob(f"{MORE_TEMPLATES}/*")])
    files = [path for path in inside if path.is_file() and path.name != PROOF]
    with ThreadPoolExecutor(4) as pool:
        return dict(zip([str(path.relative_to(folder)) for path in files], pool.map(_file, files), strict=True))


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Tensor name -> hash of its bytes."""
    tensors = [tensor for file in weight_files(folder)[0] for tensor in read_header(file).values()]
    with ThreadPoolExecutor(4) as pool:
        return dict(sorted(zip([t.name for t in tensors], pool.map(_tensor, tensors), strict=True)))


def prove_tensors(folder: Path, written: Mapping[str, str]) -> dict[str, str]:
    """The hashes of the tensors on disk. Raises RunError listing those that are not what was written."""
    found = tensor_hashes(folder)
    wrong = differences(written, found)
    if wrong:
        raise RunError(f"{folder}: tensors on disk are not what was written:\n  " + "\n  ".join(wrong))
    return found


def verify_folder(folder: Path) -> list[str]:
    """What in an exported folder is no longer what its proof says, a line each; every tensor is named."""
    proof: Mapping[str, Any] = read_json(folder / PROOF)
    wrong = differences(proof.get("tensors", {}), tensor_hashes(folder))
    files = differences(proof.get("sha256", {}), file_hashes(folder))
    return wrong + [line for line in files if not (wrong and ".safetensors: " in line)]


def differences(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line for each name that is missing, new, or has another hash."""
    lines = [f"{name}: missing" for name in expected if name not in found]
    lines += [f"{name}: not in the proof" for name in found if name not in expected]
    return lines + [f"{name}: other bytes" for name in expected if found.get(name, expected[name]) != expected[name]]


def _file(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _tensor(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    with open(tensor.file, "rb") as stream:
        stream.seek(tensor.start)
        left = tensor.stop - tensor.start
        while left:
            piece = stream.read(min(CHUNK, left))
            if not piece:
                raise RunError(f"{tensor.file}: {tensor.name} is cut short")
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()
