"""The instant at which a checkpoint begins to exist."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

from itune.checkpoint.manifest import NAME, sync_folder


def commit(temporary: Path, final: Path) -> None:
    """Make the finished folder `temporary`, manifest included, the checkpoint `final`.

    One rename; where that is many renames, the manifest is moved last, on its own: without it a folder is none.
    """
    if renames_whole_folders(final.parent):
        os.rename(temporary, final)
    else:
        held = temporary.with_name(f"{temporary.name}-manifest")
        os.rename(temporary / NAME, held)
        os.rename(temporary, final)
        os.rename(held, final / NAME)
    sync_folder(final.parent)


def renames_whole_folders(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> bool:
    """Whether a folder here is renamed in one step: on every disk, but not on a bucket mounted by FUSE (gcsfuse)."""
    best, kind = -1, ""
    for line in mounts.read_text().splitlines() if mounts.is_file() else ():
        before, _, after = line.partition(" - ")
        point = Path(before.split()[4].encode().decode("unicode_escape"))  # a space is written as \040
        if folder.absolute().is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), after.split()[0]
    return not kind.startswith("fuse")


def remove_while_written(folder: Path, quiet: float = 0.5, limit: float = 10.0) -> None:
    """Remove a folder into which threads of a failed save may still write: Orbax raises when its first writer fails,
    and the others make the folder anew. Returns once it stayed away for `quiet` seconds, at the latest after `limit`.
    """
    end = time.monotonic() + limit
    gone_since = time.monotonic()
    while time.monotonic() < min(gone_since + quiet, end):
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            gone_since = time.monotonic()
        time.sleep(0.02)
