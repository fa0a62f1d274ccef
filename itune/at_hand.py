"""Verbs on runs and results in buckets: while one runs, its arguments name copies on this machine."""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

from itune.storage.bucket import is_url
from itune.types import InputError

_WANTED = {"checkpoints": "all", "report": "none"}  # which checkpoints a verb reads, the newest or --step else


@contextlib.contextmanager
def at_hand(arguments: argparse.Namespace) -> Iterator[None]:
    """Replace the URLs among the arguments of a verb by paths here; what the verb writes there is uploaded at the end.

    What it prints has the URLs again, `by_url` puts them into any text. `itune train` looks after its own workdir.
    """
    given = {name: value for name, value in vars(arguments).items() if is_url(value)}
    verb = arguments.verb
    if verb == "train":
        given.pop("workdir", None)
    with contextlib.ExitStack() as stack:
        if given:
            from itune.checkpoint.view import uploaded, view
            from itune.runtime.secrets import HidingStream
            from itune.storage.fetch import local_files

            stream = HidingStream(sys.stdout, functools.partial(by_url, arguments))
            stack.enter_context(contextlib.redirect_stdout(cast(TextIO, stream)))
        for name, url in given.items():
            if name == "config":  # not a recipe: that is a program
                arguments.config = next(iter(local_files(url, (".json",), "--config")))
            elif name in ("workdir", "other") and verb not in ("demo", "verify"):
                step = getattr(arguments, "step", None)
                wanted = _WANTED.get(verb, "newest" if step is None else step)
                _put(arguments, name, stack.enter_context(view(url, wanted)))
            elif name == "model" and _is_run(url):
                _put(arguments, name, stack.enter_context(view(url)))
            elif name == "out":
                from itune.export.hashes import PROOF

                _put(arguments, name, stack.enter_context(uploaded(url, PROOF if verb == "export" else "")))
            elif name != "model":
                raise InputError(f"{name}: {url} is in a bucket; expected a path on this machine")
        yield


def by_url(arguments: argparse.Namespace, text: str) -> str:
    """`text` with the URL that was given in the place of the path here that stands for it."""
    for path, url in getattr(arguments, "urls", {}).items():
        text = text.replace(path, url)
    return text


def _put(arguments: argparse.Namespace, name: str, path: Path) -> None:
    arguments.urls = {**getattr(arguments, "urls", {}), str(path): getattr(arguments, name).rstrip("/")}
    setattr(arguments, name, str(path))


def _is_run(url: str) -> bool:
    from itune.storage.bucket import Bucket, reaching

    with reaching(url):
        return bool(Bucket(url).list("checkpoints"))
