"""What a run says: library messages where the user sees them, and `crash.json` when it fails."""

from __future__ import annotations

import contextlib
import json
import logging
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from itune.runtime.secrets import redact
from itune.writers import write_atomically


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


def write_crash(workdir: Path, error: BaseException, facts: Mapping[str, Any]) -> Path:
    """Write the error, its traceback, the time and `facts` (step, last events, versions, config), secrets hidden."""
    record = {
        "error": f"{type(error).__name__}: {error}",
        "time": time.strftime("%Y-%m-%d %H:%M:%S%z"),
        **facts,
        "traceback": traceback.format_exception(error),
    }
    path = workdir / "crash.json"
    write_atomically(path, redact(json.dumps(record, indent=1, default=str)) + "\n")
    return path


def explained(error: BaseException) -> str:
    """The first line of an error of some library; for a device that is out of memory, what helps."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if "RESOURCE_EXHAUSTED" in text:
        return ("out of device memory: raise train.accumulation or lower train.batch_size, set train.remat=full, or "
                f"give mesh.fsdp more devices ({text[:300]})")
    return f"{type(error).__name__}: {text}"[:400]
