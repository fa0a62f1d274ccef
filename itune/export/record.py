"""What an export's proof says of the run behind it: source, data, template, config, masks, steps."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from itune.checkpoint import Store
from itune.data.store import hash_of
from itune.models.hf.files import read_json


def commit_of(origin: Path, revision: str | None) -> str | None:
    """The revision of the source: in the hub's cache the commit that was downloaded, else what was asked for."""
    return origin.name if origin.parent.name == "snapshots" else revision


def run_record(workdir: Path, run: Any) -> dict[str, Any]:
    """The entries of a LoadedRun: hashes of its config, chat template, tokenizer and data, and what carried weight.

    data.inputs: the hashes of the files by source. masks: counts over the training data, None without its report.
    """
    saved = Store(workdir / "checkpoints", log=lambda _: None).read(run.step)
    report = read_json(workdir / "data" / "report.json") if (workdir / "data" / "report.json").is_file() else None
    template = run.tokenizer.template
    inputs = (report or {}).get("inputs", {})
    return {
        "workdir": str(workdir),
        "step": run.step,
        "total_steps": saved.data.get("total_steps"),
        "config_sha256": hash_of(run.config.to_dict()),
        "chat_template_sha256": hashlib.sha256(template.source.encode()).hexdigest() if template else None,
        "tokenizer_sha256": run.tokenizer.fingerprint,
        "data": {
            "fingerprint": saved.data.get("fingerprint"),
            "inputs": {name: inputs.get(name, {}) for name in ("train", "eval")},
        },
        "masks": None if report is None else _masks(report),
    }


def _masks(report: dict[str, Any]) -> dict[str, Any]:
    names = ("rows", "kept", "truncated", "tokens", "supervised_tokens", "dropped")
    counts = {name: report.get(name) for name in names}
    share = report["supervised_tokens"] / report["tokens"] if report.get("tokens") else None
    return counts | {"supervised_share": share}
