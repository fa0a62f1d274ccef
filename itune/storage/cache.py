"""Where itune keeps what it can compute or fetch again."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from itune.storage.bucket import is_url


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/itune`, or `~/.cache/itune`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "itune"


@functools.cache
def code_digest(package: Path) -> str:
    """Hash of a package's code: what another version of it wrote is not read."""
    hasher = hashlib.sha256()
    for file in sorted(package.rglob("*.py")):
        hasher.update(file.read_bytes())
    return hasher.hexdigest()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, so that one process of this machine at a time writes what it guards."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def local_workdir(workdir: str | os.PathLike) -> Path:
    """The folder here that a run works in: `workdir` itself; of a bucket's, its staging folder.

    That is `$ITUNE_STAGING/NAME-HASH`, by default in `runs` of the cache folder.
    """
    if not is_url(str(workdir)):
        return Path(workdir)
    root = Path(os.environ.get("ITUNE_STAGING") or cache_folder() / "runs").expanduser().absolute()
    return root / name_of(str(workdir))


def name_of(url: str) -> str:
    """A folder name for a URL: its last part and a hash of the whole."""
    url = url.rstrip("/")
    return f"{url.rsplit('/', 1)[-1]}-{hashlib.sha256(url.encode()).hexdigest()[:10]}"
