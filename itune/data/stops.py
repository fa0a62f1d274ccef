"""The tokens that end a generated answer, as a model folder or hub id names them."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from itune.types import InputError

log = logging.getLogger("itune")

GENERATION = "generation_config.json"


def stop_ids(config: Mapping[str, Any], where: str = GENERATION) -> list[int]:
    """`eos_token_id` of a config, which may be absent, a number or a list; anything else is an InputError."""
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise InputError(f"{where}: eos_token_id is {value!r}; expected an id or a list of ids")
    return list(ids)


def source_stop_ids(path: str, revision: str | None = None) -> list[int]:
    """Those of a model: of its generation_config.json, of config.json where it has none (as in transformers)."""
    for name in (GENERATION, "config.json"):
        file = _find(path, name, revision)
        if file is not None:
            return stop_ids(_object(file), str(file))
    return []


def _find(path: str, name: str, revision: str | None) -> Path | None:
    """A file of a folder, or of a hub id whose tokenizer was just read."""
    if not path:
        return None
    if Path(path).exists():
        return Path(path, name) if Path(path, name).is_file() else None
    from transformers.utils import cached_file

    raise_nothing = {f"_raise_exceptions_for_{kind}": False for kind in ("missing_entries", "connection_errors")}
    try:
        found = cached_file(path, name, revision=revision, **raise_nothing)
    except OSError as error:
        log.warning("%s: %s cannot be had (%s): only the tokenizer says what ends an answer", path, name, error)
        return None
    return Path(found) if found else None


def _object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: expected a JSON object, found {type(value).__name__}")
    return value
