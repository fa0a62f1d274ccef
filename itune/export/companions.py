"""The files beside the weights: tokenizer, chat template, generation config. Copied where training left them alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from itune.data.stops import GENERATION, stop_ids
from itune.export.hashes import MORE_TEMPLATES
from itune.models.hf.files import read_json

# what the tokenizers and generation of transformers read; everything else in a source folder is not ours to pass on
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def write_tokenizer(folder: Path, origin: Path, tokenizer: Any) -> None:
    """Write tokenizer and chat template: copied from the source where the tokenizer equals the source's, or is None."""
    if tokenizer is None or _is_sources(origin, tokenizer):
        for name in TOKENIZER_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, folder / name)
        for file in origin.glob(f"{MORE_TEMPLATES}/*.jinja"):
            (folder / MORE_TEMPLATES).mkdir(exist_ok=True)
            shutil.copyfile(file, folder / MORE_TEMPLATES / file.name)
    else:
        _tokenizer_of(tokenizer).hf.save_pretrained(folder)


def write_companions(folder: Path, origin: Path, tokenizer: Any) -> None:
    """Write all files of a model folder but config and weights. Without a tokenizer all are copied from the source."""
    write_tokenizer(folder, origin, tokenizer)
    generation = read_json(origin / GENERATION) if (origin / GENERATION).is_file() else None
    if tokenizer is None or (generation is not None and not _missing_stops(generation, tokenizer)):
        if generation is not None:
            shutil.copyfile(origin / GENERATION, folder / GENERATION)
        return
    config = read_json(folder / "config.json")
    generation = generation or {k: config[k] for k in ("bos_token_id", "pad_token_id") if config.get(k) is not None}
    stops = sorted({*stop_ids(generation), *_tokenizer_of(tokenizer).stop_ids})
    if stops:
        generation["eos_token_id"] = stops
        _write(folder / GENERATION, generation)
    if stops and set(stops) - set(stop_ids(config)):
        _write(folder / "config.json", {**config, "eos_token_id": stops})


def _missing_stops(generation: dict[str, Any], tokenizer: Any) -> set[int]:
    return set(_tokenizer_of(tokenizer).stop_ids) - set(stop_ids(generation))


def _is_sources(origin: Path, tokenizer: Any) -> bool:
    """Whether the source folder's own tokenizer has the same vocabulary, added tokens and chat template."""
    from itune.data.templates import load_tokenizer

    if not any((origin / name).is_file() for name in TOKENIZER_FILES):
        return False
    return load_tokenizer(str(origin)).fingerprint == _tokenizer_of(tokenizer).fingerprint


def _tokenizer_of(given: Any) -> Any:
    from itune.data.render import as_tokenizer

    return as_tokenizer(given)


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
