"""What is left behind when a run fails: `crash.json`."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itune.runtime.secrets import redact
from itune.writers import write_atomically


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
