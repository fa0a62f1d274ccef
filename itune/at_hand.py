"""Verbs on runs and results in buckets: while one runs, its arguments name copies on this machine."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator

from itune.storage.bucket import is_url
from itune.types import InputError

_WANTED = {"checkpoints": "all", "report": "none"}  # which checkpoints a verb reads, the newest or --step else


@contextlib.contextmanager
def at_hand(arguments: argparse.Namespace) -> Iterator[None]:
    """Replace the URLs among the arguments of a verb by paths here; what the verb writes there is uploaded at the end.

    `itune train` looks after its own workdir.
    """
    given = {name: value for name, value in vars(arguments).items() if is_url(value)}
    verb = arguments.verb
    if verb == "train":
        given.pop("workdir", None)
    with contextlib.ExitStack() as stack:
        if given:
            from itune.checkpoint.view import uploaded, view
            from itune.storage.fetch import local_files
        for name, url in given.items():
            if name == "config":  # not a recipe: that is a program
                arguments.config = local_files(url, (".json",), "--config")[0]
            elif name in ("workdir", "other") and verb not in ("demo", "verify"):
                step = getattr(arguments, "step", None)
                wanted = _WANTED.get(verb, "newest" if step is None else step)
                setattr(arguments, name, str(stack.enter_context(view(url, wanted))))
            elif name == "model" and _is_run(url):
                arguments.model = str(stack.enter_context(view(url)))
            elif name == "out":
                from itune.export.hashes import PROOF

                arguments.out = str(stack.enter_context(uploaded(url, PROOF if verb == "export" else "")))
            elif name != "model":
                raise InputError(f"{name}: {url} is in a bucket; expected a path on this machine")
        yield


def _is_run(url: str) -> bool:
    from itune.storage.bucket import Bucket, reaching

    with reaching(url):
        return bool(Bucket(url).list("checkpoints"))
