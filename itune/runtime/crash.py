"""What a run says: library messages where the user sees them, and `crash.json` when it fails."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from itune.runtime.secrets import redact_tree
from itune.writers import plain, write_atomically

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_REFUSED = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG,
            errno.EISDIR, errno.ENOTDIR)  # fmt: skip


@contextlib.contextmanager
def shown_to(log: Callable[[str], None]) -> Iterator[None]:
    """Pass what the package's modules report to Python's `logging` (a grown embedding, a slower path) on to `log`."""
    logger = logging.getLogger("itune")
    handler = logging.Handler()
    handler.emit = lambda record: log(record.getMessage())  # type: ignore[method-assign]
    level, propagate = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def crash_path(workdir: Path, process: int = 0) -> Path:
    """`crash.json` of the first process, `crash-<i>.json` of the others."""
    return workdir / (f"crash-{process}.json" if process else "crash.json")


def write_crash(workdir: Path, error: BaseException | str, facts: Mapping[str, Any], process: int = 0) -> str:
    """Write the error, its traceback, the time and `facts` (step, last events, versions, config), secrets hidden.

    Returns "details: PATH" for the message to the user. Where the run directory takes no file any more, the record goes
    to the system's temporary folder.
    """
    record = {
        "error": f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else error,
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        "process": process,
        **facts,
        "traceback": traceback.format_exception(error) if isinstance(error, BaseException) else [],
    }
    text = json.dumps(redact_tree(record), indent=1, default=plain) + "\n"
    path = crash_path(workdir, process)
    try:
        write_atomically(path, text)
    except OSError:
        try:
            handle, elsewhere = tempfile.mkstemp(prefix="itune-crash-", suffix=".json")
            with open(handle, "w") as stream:
                stream.write(text)
            path = Path(elsewhere)
        except OSError as unwritten:
            return f"no record of it could be written: {unwritten}"
    return f"details: {path}"


def of_the_machine(error: BaseException) -> bool:
    """Whether the disk, its folders, the rights or the limits of the machine failed, and no program."""
    return isinstance(error, OSError) and error.errno in (*_NO_ROOM, *_REFUSED)


def without_device() -> str:
    """What is wrong with `JAX_PLATFORMS` where jax finds no device by it; "" where it has some or was never asked."""
    wanted, jax = os.environ.get("JAX_PLATFORMS"), sys.modules.get("jax")
    if not wanted or jax is None:
        return ""
    try:
        jax.devices()
    except Exception as error:  # RuntimeError; where its plugin is not installed, an assertion of jax
        reason = explained(error).rstrip(": ")
        return f"JAX_PLATFORMS={wanted}: jax finds no such device here ({reason}); unset it, or set JAX_PLATFORMS=cpu"
    return ""


def explained(error: BaseException) -> str:
    """The first line of an error of some library; for a full disk or a device out of memory, what helps."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if isinstance(error, OSError) and error.errno in _NO_ROOM:
        where = f" {error.filename}" if error.filename else ""
        return f"cannot write{where}: {error.strerror}; free some space or choose another place"
    if isinstance(error, OSError) and error.errno in _REFUSED:
        return f"{error.filename or 'the system'}: {error.strerror}"
    if "RESOURCE_EXHAUSTED" in text:
        return ("out of device memory: raise train.accumulation or lower train.batch_size, set train.remat=full, or "
                f"give mesh.fsdp more devices ({text[:300]})")
    return f"{type(error).__name__}: {text}"[:400]
