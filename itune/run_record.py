"""What a run writes about itself: its settings and surroundings, its events, and a record when it fails."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import jax

from itune.config import Config
from itune.report import write_report
from itune.run_source import source_facts
from itune.runtime.crash import crash_path, write_crash
from itune.runtime.environment import environment
from itune.runtime.events import EventLog
from itune.runtime.secrets import redact_tree
from itune.writers import plain, write_atomically


class RunRecord:
    """The record of one process of a run. `config` is the resolved config as it may be shown, secrets hidden."""

    def __init__(self, config: Config, workdir: Path) -> None:
        self.workdir, self.process = workdir, jax.process_index()
        self.config: dict[str, Any] = redact_tree(config.to_dict())
        self.events = EventLog(workdir, self.process)
        self.environment: dict[str, Any] = {}
        self.source: dict[str, Any] = {}  # of the model that the run begins with; checkpoints say it

    def start(self) -> None:
        """A new attempt begins: the record of an earlier failure goes."""
        crash_path(self.workdir, self.process).unlink(missing_ok=True)
        self.events.write(0, "start", pid=os.getpid(), host=socket.gethostname(), processes=jax.process_count())

    def write_facts(self, data: Any, config: Config) -> None:
        """`config.json`, `environment.json` and the record of the data; the first process writes them."""
        self.environment, self.source = environment(), source_facts(config.model, data.tokenizer)
        if self.process:
            return
        self.write_config()
        facts = json.dumps(self.environment, indent=1, default=plain) + "\n"
        write_atomically(self.workdir / "environment.json", facts)
        data.dataset.write_record(self.workdir / "data", config.data)

    def write_config(self) -> None:
        """`config.json` alone; the first process writes it."""
        if not self.process:
            write_atomically(self.workdir / "config.json", json.dumps(self.config, indent=1, default=plain) + "\n")

    def write_end(self, summary: dict[str, Any]) -> None:
        """`summary.json` and `report.html`; the first process writes them."""
        if not self.process:
            write_atomically(self.workdir / "summary.json", json.dumps(summary, indent=1) + "\n")
            write_report(self.workdir)

    def read_end(self, step: int) -> dict[str, Any] | None:
        """What `summary.json` says of a run that ended with this step; None where it says nothing of that end."""
        try:
            found = json.loads((self.workdir / "summary.json").read_text(encoding="utf-8"))
            return found if found["step"] == step and not found["preempted"] else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def write_failure(self, error: Exception, step: int, **facts: Any) -> str:
        """Write the crash record; returns where it is, as a message says it."""
        self.events.write(step, "failed", text=f"{type(error).__name__}: {error}")
        devices = [str(device) for device in jax.devices()]
        return write_crash(self.workdir, error, {
            "step": step, **facts, "last_events": list(self.events.last), "devices": devices,
            "environment": self.environment or environment(), "config": self.config,
        }, self.process)
