"""The manifest of a folder: size and SHA-256 of every file, written last and checked before anything is read.

Orbax checks no content: a flipped bit in an array file is restored without a word. The manifest is what finds it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

NAME = "manifest.json"
FORMAT = 1


def write_manifest(folder: Path, **facts: Any) -> dict[str, Any]:
    """Hash every file below `folder`, flush all to disk, and write `manifest.json` with the hashes and `facts`."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != NAME):
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    manifest = {"format": FORMAT, **facts, "files": files}
    with (folder / NAME).open("w") as stream:
        stream.write(_render(manifest))
        stream.flush()
        os.fsync(stream.fileno())
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        sync_folder(path)
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises ValueError, with the reason, when it is not what `write_manifest` wrote."""
    try:
        text = (folder / NAME).read_text()
    except FileNotFoundError:
        raise ValueError(f"{folder / NAME} is missing: never finished, or deleted") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / NAME} cannot be read: {error}") from None
    try:
        manifest = json.loads(text)
    except ValueError:
        raise ValueError(f"{folder / NAME} is damaged: it is not JSON") from None
    if not isinstance(manifest, dict) or _render({k: v for k, v in manifest.items() if k != "sha256"}) != text:
        raise ValueError(f"{folder / NAME} is damaged: its content does not agree with its own SHA-256")
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{folder / NAME} has format {manifest.get('format')}, this version reads format {FORMAT}")
    return manifest


def step_of(name: str) -> int | None:
    """The step whose checkpoint a folder of this name is; None for a name that is none: `05` is not step 5."""
    return int(name) if name.isascii() and name.isdecimal() and (name == "0" or name[0] != "0") else None


def find_damage(folder: Path, step: int) -> list[str]:
    """What is wrong in the checkpoint of this step, a line each: files that are missing, of another size, or of another
    content; or all of it is of another step."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        return [str(error)]
    if manifest.get("step") != step:
        return [f"{folder / NAME} is of step {manifest.get('step')}: the folder was copied or renamed"]
    return [line for name, expected in manifest["files"].items() if (line := _check_file(folder, name, expected))]


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_file(folder: Path, name: str, expected: dict[str, Any]) -> str:
    pure = PurePosixPath(name)
    path = folder / pure
    if pure.is_absolute() or ".." in pure.parts or not path.resolve().is_relative_to(folder.resolve()):
        return f"{folder / NAME} names a file outside the folder: {name}"
    if not path.is_file():
        return f"{path} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{path} has {path.stat().st_size} bytes, {expected['size']} were written"
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected["sha256"]:
        return f"{path} is damaged: its SHA-256 begins {digest[:12]}, {expected['sha256'][:12]} was written"
    return ""


def _render(manifest: dict[str, Any]) -> str:
    """The one text of a manifest, ending in the SHA-256 of the rest: any other byte in the file is found."""
    body = json.dumps(manifest, indent=1, sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True) + "\n"
