"""Where a verb writes (`--out`, `--json`), checked before it works: hours of it are not lost to a wrong path."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from itune.storage.bucket import is_url
from itune.types import InputError

_FILES = ("report", "generate")  # whose --out is a file; the other verbs write a folder


def check_targets(arguments: argparse.Namespace) -> None:
    """Raise InputError where `--out` or `--json` cannot be written, or would replace what the verb reads.

    A URL is tried by what uploads there. The current folder must be there, too.
    """
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise InputError("the current folder was removed; go to another one (cd)") from error
    _check_readable(arguments)
    names = ("json", "out", "workdir") if arguments.verb in ("demo", "verify") else ("json", "out")
    given = {name: value for name in names if (value := getattr(arguments, name, None)) and not is_url(value)}
    for name, path in given.items():
        folder = name == "workdir" or (name == "out" and arguments.verb not in _FILES)
        if "\0" in path or (os.path.exists(path) and os.path.isdir(path) != folder):
            found = "is no path" if "\0" in path else "is a file" if folder else "is a folder"
            raise InputError(f"--{name} {path!r}: {found}; expected a {'folder' if folder else 'file'} to write")
        inside = Path(os.path.realpath(path), "file") if folder else Path(path).absolute()
        if above := blocked_by(inside):
            raise InputError(f"--{name} {path}: cannot be written in {above}; expected a place in a folder of yours")
    out, prompts = given.get("out"), getattr(arguments, "prompts", None)
    if out and prompts and os.path.exists(out) and os.path.exists(prompts) and os.path.samefile(out, prompts):
        raise InputError(f"--out {out}: is the file of the prompts; expected another one")


def blocked_by(path: Path) -> Path | None:
    """The nearest of the folders above an absolute path that is there, where nothing can be made in it."""
    above = next(each for each in path.parents if os.path.lexists(each))
    return None if above.is_dir() and os.access(above, os.W_OK) else above


def _check_readable(arguments: argparse.Namespace) -> None:
    """A path whose bytes are no text here could be opened, but not be written into any file of the run."""
    for name in ("workdir", "out", "json"):
        path = getattr(arguments, name, None) or ""
        if any("\ud800" <= letter <= "\udfff" for letter in path):
            raise InputError(f"--{name} {path!a}: is no text in the encoding of this machine "
                             f"({sys.getfilesystemencoding()}); set LC_ALL=C.UTF-8, or name another path")
        if path == "" and getattr(arguments, name, None) is not None:
            raise InputError(f"--{name} is empty; expected a path")
