"""A run directory in a bucket, for the commands that read one: a copy in the cache, and what they add goes back."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from itune.checkpoint.mirror import Mirror
from itune.checkpoint.store import Store
from itune.runtime.supervisor import announced_processes
from itune.storage.bucket import Bucket, reaching
from itune.storage.cache import cache_folder, locked, name_of
from itune.types import InputError, RunError

_TRIAL = ".may-write"  # an object that is written and removed


def open_view(url: str, wanted: str | int = "newest") -> Mirror:
    """The Mirror of a run with its copy here up to date: its files and the checkpoints that are wanted.

    `wanted`: a step, `newest` (the newest that verifies), `all` (damaged ones too) or `none`. Raises InputError where
    there is no such run or step, RunError where what was asked for is damaged.
    """
    folder = cache_folder() / "views" / name_of(url)
    mirror = Mirror(url, folder)
    with locked(folder.with_name(f"{folder.name}.lock")):
        mirror.look()
        steps = mirror.steps()
        if wanted == "all":
            for step in steps:
                mirror.fetch(step, damaged=True)
        elif wanted == "newest":
            Store(folder / "checkpoints", mirror=mirror).newest_good_here()
        elif wanted != "none":
            if wanted not in steps:
                raise InputError(f"{url}: no checkpoint of step {wanted}; steps there: "
                                 f"{', '.join(map(str, steps)) or 'none'}")
            if damage := mirror.bring(int(wanted)):
                raise RunError(f"checkpoint of step {wanted} was asked for by name and is damaged: {'; '.join(damage)}")
    return mirror


@contextlib.contextmanager
def view(url: str, wanted: str | int = "newest") -> Iterator[Path]:
    """The folder of `open_view`; what the block adds or changes there is uploaded when it ended well."""
    mirror = open_view(url, wanted)
    yield mirror.folder
    if not _one_of_several() or jax.process_index() == 0:
        mirror.push_files()


@contextlib.contextmanager
def uploaded(url: str, proof: str = "") -> Iterator[Path]:
    """A path here for a folder or file that is written in the block; it is uploaded when the block ended well.

    A bucket that cannot be written is an InputError before the block. With `proof`, the name of the file that makes a
    folder one of ours, only such a folder is replaced (InputError for another one), and that file is uploaded last: the
    folder in the bucket is whole when it has it.
    """
    if announced_processes() > 1:
        raise InputError(f"--out {url}: several processes write one folder; expected a path that all of them share")
    bucket = Bucket(url)
    with reaching(url):
        before = [name for name in bucket.list() if name != _TRIAL]
    if proof and before and proof not in before:
        raise InputError(f"{url}: is not empty and no earlier export (it has {', '.join(before[:4])}); choose another")
    with reaching(url):  # a bucket that is missing, or may only be read, is said before the work
        bucket.write(_TRIAL, b"")
        bucket.remove([_TRIAL])
    home = cache_folder() / "uploads"
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home) as folder:
        target = Path(folder) / bucket.url.rsplit("/", 1)[-1]
        yield target
        if _one_of_several():
            raise RunError(f"--out {url}: several processes write one folder; expected a path that all of them share")
        with reaching(url, RunError):
            _upload(target, bucket, before, proof)
        print(f"uploaded to {url}")


def _one_of_several() -> bool:
    """Whether this process has joined a job; asks no device, which another run may hold."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def _upload(target: Path, bucket: Bucket, before: list[str], proof: str) -> None:
    if target.is_file():
        Bucket(bucket.url.rpartition("/")[0]).put({target.name: target})
        return
    files = {path.relative_to(target).as_posix(): path for path in target.rglob("*") if path.is_file()}
    if proof in files:
        bucket.remove([proof])
        bucket.remove([name for name in before if name not in files])
    last = {name: path for name, path in files.items() if name == proof}
    bucket.put({name: path for name, path in files.items() if name not in last})
    bucket.put(last)
