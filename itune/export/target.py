"""Where an export goes: what may be written there, and how it appears whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax

from itune.export.hashes import PROOF
from itune.models.hf.write import disk_error
from itune.targets import blocked_by
from itune.types import InputError, RunError

MAX_NAME = 220  # bytes; file systems take 255, and the names beside it while it is written are longer


def check_target(out: Path, needed: Mapping[str, Path]) -> None:
    """Raise InputError unless the folder may be written: it is new, empty, or an earlier export.

    `needed`: folders that the export reads, by what a message calls them; none may be replaced.
    """
    try:
        _check(out, needed)
    except (OSError, RuntimeError) as error:  # a loop of links; a folder that may not be read
        raise InputError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error


def _check(out: Path, needed: Mapping[str, Path]) -> None:
    for name in out.parts:
        if len(os.fsencode(name)) > MAX_NAME:
            raise InputError(f"{out}: a name of {len(os.fsencode(name))} bytes; expected at most {MAX_NAME}")
    folder = out.resolve()
    if out.exists():
        for what, path in needed.items():
            if path.exists() and path.resolve().is_relative_to(folder):
                raise InputError(f"{out}: {'is' if path.resolve() == folder else 'holds'} {what}; "
                                 "choose another folder")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; expected a folder to write")
    if out.is_dir() and any(out.iterdir()) and not (out / PROOF).is_file():
        found = ", ".join(sorted(p.name for p in out.iterdir())[:4])
        raise InputError(f"{out}: is not empty and no earlier export (it has {found}); choose a new folder")
    # the folder is replaced as a whole, by one that is made beside it
    if Path.cwd().is_relative_to(folder):
        raise InputError(f"{out}: is the current folder, or around it; choose a new folder in it")
    if os.path.ismount(folder):
        raise InputError(f"{out}: is a mount point, which nothing can take the place of; choose a new folder in it")
    if above := blocked_by(folder):
        raise InputError(f"{out}: {above} cannot be written, where the export is made; choose a place in a folder of "
                         "yours")


@contextlib.contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder beside `out` that takes its place when all went well, and is removed otherwise.

    Where `out` is a link, it stays, and what it leads to is replaced. Errors name `out`.
    """
    first, folder = jax.process_index() == 0, out.resolve()
    staging, aside = folder.parent / f".{folder.name}.exporting", folder.parent / f".{folder.name}.replaced"
    if first:
        partial = folder.parent.glob(f".{glob.escape(staging.name)}.*.partial")
        for left in (staging, *partial):  # of exports that were killed
            shutil.rmtree(left, ignore_errors=True)
        if (aside / PROOF).is_file() and not folder.exists():  # killed between the two renames of _replace
            os.replace(aside, folder)
    try:
        yield staging
        if first:
            _replace(staging, folder, aside)
    except (OSError, InputError, RunError) as error:
        told = disk_error(out, error) if isinstance(error, OSError) else error
        beside = rf"{re.escape(str(folder.parent))}/\.+{re.escape(folder.name)}\.exporting(\.\d+\.partial)?"
        raise type(told)(re.sub(beside, lambda _: str(out), str(told))) from error
    finally:
        if first:
            shutil.rmtree(staging, ignore_errors=True)
    barrier("export done")


def _replace(staging: Path, folder: Path, aside: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()):
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
        os.replace(staging, folder)
        shutil.rmtree(aside)
    else:
        os.replace(staging, folder)


def barrier(name: str) -> None:
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
