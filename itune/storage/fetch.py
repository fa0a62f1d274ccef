"""Objects of a bucket on this machine: fetched once, kept in the cache under a name that changes with the object."""

from __future__ import annotations

import difflib
import fnmatch
import functools
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from itune.storage.bucket import Bucket, is_url, reaching
from itune.storage.cache import cache_folder, locked
from itune.storage.hub import MODEL_FILES, hub_folder, is_hub_id, is_read
from itune.types import InputError

_GLOB = "*?["
# URL of a model -> the objects and versions that this process saw: weights are of the state of the configuration
LISTED: dict[str, dict[str, str]] = {}


def local_files(url: str, suffixes: Sequence[str], key: str) -> dict[str, str]:
    """Local copy -> URL of the object, of the objects of a folder, or of those that a glob matches, in order of name.

    Raises InputError, naming the config `key`, where there is none, where one ends in none of `suffixes`, or where the
    bucket cannot be reached.
    """
    root, pattern = _split(url)
    with reaching(f"{key}: {url}"):
        bucket = Bucket(root)
        if any(sign in pattern for sign in _GLOB):
            names = sorted(name for name in bucket.list() if _matches(name, pattern))
        else:
            found = bucket.list(pattern)
            names = [pattern] if pattern in found else sorted(n for n in found if n.endswith(tuple(suffixes)))
        if not names:
            raise InputError(f"{key}: {url}: no such object, nor a folder with one that ends in {', '.join(suffixes)}")
        if wrong := [name for name in names if not name.endswith(tuple(suffixes))]:
            raise InputError(f"{key}: {bucket.url}/{wrong[0]} ends in none of {', '.join(suffixes)}")
        urls = [f"{bucket.url}/{name}" for name in names]
        with ThreadPoolExecutor(4) as pool:
            return dict(zip(pool.map(lambda each: str(_object(each, key)), urls), urls, strict=True))


def local_folder(path: str, key: str = "model.path", weights: bool = True) -> str:
    """A path as it is; the local copy of a model or adapter folder in a bucket. A process looks once for each.

    The copy is a folder of its own for each state of the objects, and appears there whole or not at all. Without
    `weights` it has all but them: enough to plan and to prepare data.
    """
    if not is_url(path):
        return path
    found = _fetched_folder(path, key, weights)
    if not Path(found).is_dir():  # somebody cleared the cache
        _fetched_folder.cache_clear()
        found = _fetched_folder(path, key, weights)
    return found


def model_folder(path: str, revision: str | None = None, key: str = "model.path", weights: bool = True) -> Path:
    """The folder of a model or adapter: the one here, or the cache's copy of a bucket's or a hub id's.

    Without `weights`, see `local_folder`. Raises InputError, naming the config `key`, where there is none, or where
    bucket or hub do not give it.
    """
    found = local_folder(path, key, weights)
    if Path(found).is_dir():
        return Path(found)
    expected = "a folder with config.json and safetensors" if key == "model.path" else "an adapter folder of peft"
    if Path(found).exists():
        raise InputError(f"{key}: {found} is a file; expected {expected}, or a hub id")
    if not is_hub_id(found):
        raise InputError(f"{key}: no folder {found}; expected {expected}, or a hub id{_beside(found)}")
    return hub_folder(found, revision, key, weights)


def _beside(given: str) -> str:
    parent = Path(given).parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(given).name, names, n=1)
    return f"; nearest folder: {parent / near[0]}" if near else ""


@functools.lru_cache(maxsize=64)
def _fetched_folder(url: str, key: str, weights: bool) -> str:
    with reaching(f"{key}: {url}"):
        bucket = Bucket(url)
        return str(_steady(bucket, "", PurePosixPath(bucket.path).name, key, weights))


def _object(url: str, key: str) -> Path:
    home, _, name = url.rpartition("/")
    return _steady(Bucket(home), name, name, key) / name


def _steady(bucket: Bucket, name: str, label: str, key: str, weights: bool = True) -> Path:
    """The cache's copy of one object, or without a name of a model's; fetched again where one changed on the way."""
    for _ in range(3):
        found = _wanted(bucket, name)
        if not found:
            expected = f"no object {name}" if name else f"no model there: no object is of {', '.join(MODEL_FILES)}"
            raise InputError(f"{key}: {bucket.url}: {expected}")
        if not name and LISTED.get(bucket.url, found) != found:
            raise InputError(f"{key}: {bucket.url} changed after this process had read of it; start again")
        folder = _cached(bucket, {each: v for each, v in found.items() if name or is_read(each, weights)}, label)
        if _wanted(bucket, name) == found:
            LISTED.update({} if name else {bucket.url: found})
            return folder
    raise InputError(f"{key}: {bucket.url}/{name} changes while it is read; wait until it is complete")


def _wanted(bucket: Bucket, name: str) -> dict[str, str]:
    return {each: version for each, version in bucket.list(name).items() if (each == name if name else is_read(each))}


def _cached(bucket: Bucket, found: Mapping[str, str], label: str) -> Path:
    """The folder of the cache that holds these objects in these versions; one process of this machine fetches it."""
    text = repr(sorted((f"{bucket.url}/{name}", version) for name, version in found.items()))
    folder = cache_folder() / "fetched" / f"{label}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    with locked(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            partial = folder.with_name(f".{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
            bucket.get(found, partial)
            if missing := [name for name in found if not (partial / name).is_file()]:
                raise FileNotFoundError(f"{bucket.url}/{missing[0]}")
            partial.rename(folder)
    return folder


def _split(url: str) -> tuple[str, str]:
    """(URL of the folder to look in, the rest): what stands before the first glob sign, or before the last name."""
    scheme, _, rest = url.partition("://")
    parts = rest.strip("/").split("/")
    first = next((i for i, part in enumerate(parts) if any(sign in part for sign in _GLOB)), len(parts) - 1)
    return f"{scheme}://{'/'.join(parts[: max(first, 1)])}", "/".join(parts[max(first, 1) :])


def _matches(name: str, pattern: str) -> bool:
    """As `glob`: `*` stays within a folder, `**` does not."""
    if "**" in pattern:
        return fnmatch.fnmatchcase(name, pattern.replace("**/", "*"))
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
