"""Who else may change the files of a run."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def shared_with_everyone(workdir: str | os.PathLike) -> str:
    """A warning when every user of the machine may put files into the run directory, or replace it; else ''.

    A sticky parent, such as /tmp, lets others add files but not replace ours: that is no finding.
    """
    folder = Path(workdir).absolute()
    for path in (folder, folder.parent):
        if path.is_dir():
            mode = path.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return (f"warning: {path} may be written by every user of this machine, who could change this run's "
                        f"checkpoints; chmod o-w {path}, or choose another --workdir")
    return ""
