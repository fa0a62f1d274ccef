"""What a run remembers of the model folder that it began with, and whether that is still what lies there.

Checkpoints hold weights alone: config, tokenizer and generation config are read again at `model.path`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from itune.data.stops import GENERATION
from itune.models.families import FAMILIES, find_family
from itune.models.families.common import Fields
from itune.models.hf.files import find_folder, read_config, read_json
from itune.types import InputError

CONFIG, TOKENIZER = "config.json", "tokenizer"
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "torch_dtype", "dtype")


def source_facts(section: Any, tokenizer: Any) -> dict[str, Any]:
    """What a checkpoint says of the folder of the `model` section: its configs, and the tokenizer's fingerprint."""
    folder = find_folder(section.path, section.revision or None, weights=False)
    generation = read_json(folder / GENERATION) if (folder / GENERATION).is_file() else None
    return {CONFIG: read_config(folder), GENERATION: generation, TOKENIZER: tokenizer.fingerprint}


def check_source(section: Any, tokenizer: Any, saved: Mapping[str, Any], log: Callable[[str], None]) -> None:
    """Raise InputError where another model lies at `model.path` than the one of the checkpoint with this data.

    What leaves the computation alone (stop tokens, the tokenizer's template) is only told. Checkpoints of earlier
    releases say nothing.
    """
    then = saved.get("source")
    if then is None:
        return
    now = source_facts(section, tokenizer)
    one, other = (_computation(facts[CONFIG], section.path) for facts in (then, now))
    if one != other:
        old, new = _told(then[CONFIG]), _told(now[CONFIG])
        differ = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
        raise InputError(f"{section.path}: its config.json is not that of the model which this run began with "
                         f"({', '.join(differ)} differ); put the original there again")
    changed = [name for name in (CONFIG, GENERATION, TOKENIZER) if _told(then[name]) != _told(now[name])]
    if changed:
        log(f"warning: {section.path}: {', '.join(changed)} changed since this run began; what is there now is used")


def _computation(hf: dict[str, Any], where: str) -> Any:
    family = find_family(hf, where)
    config = FAMILIES[family].config_from_hf(Fields(hf, where))
    return family, dataclasses.replace(config, init_std=0.0, max_length=1)


def _told(facts: Any) -> Any:
    return {k: v for k, v in facts.items() if k not in _NOT_THE_MODEL} if isinstance(facts, dict) else facts
