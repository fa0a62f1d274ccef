"""Model folders of the Hugging Face hub on this machine: the files that are read, from one snapshot, in its cache."""

from __future__ import annotations

import fnmatch
import functools
import re
from pathlib import Path
from typing import Any

from itune.types import InputError

WEIGHT_FILES = ["*.safetensors"]
SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # configuration, index of weights, tokenizer, chat templates
MODEL_FILES = WEIGHT_FILES + SMALL_FILES  # no pickles
# Weights again, in other layouts: Mistral's own (consolidated), gpt-oss' and Llama's own (original/), ONNX' and others.
SECOND_COPIES = ["consolidated*", *(f"*/{each}" for each in MODEL_FILES if each != "*.jinja")]


def is_read(name: str, weights: bool = True) -> bool:
    """Whether a file of a model folder is one that itune reads: configuration, tokenizer, or of the `weights`."""
    files = MODEL_FILES if weights else SMALL_FILES
    return any(fnmatch.fnmatchcase(name, each) for each in files) and not any(
        fnmatch.fnmatchcase(name, each) for each in SECOND_COPIES
    )


def is_hub_id(given: str) -> bool:
    """Whether this may be NAME or OWNER/NAME."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given)) and not given.startswith(".")


def hub_folder(repo: str, revision: str | None = None, key: str = "model.path", weights: bool = True) -> Path:
    """The snapshot of a hub id: what is not in the cache is downloaded. Without `weights`, the small files only.

    A process asks once which commit a revision is, so that weights and tokenizer are of the same. Raises InputError,
    naming the config `key`, where the hub lacks it, does not give it, or cannot be reached while the cache lacks it.
    """
    return _folder(repo, revision or None, key, weights)


@functools.lru_cache(maxsize=64)
def _folder(repo: str, revision: str | None, key: str, weights: bool) -> Path:
    if not weights:
        return _snapshot(repo, revision, key, SMALL_FILES, tqdm_class=_silent())
    return _snapshot(repo, _folder(repo, revision, key, False).name, key, MODEL_FILES)


def _snapshot(repo: str, revision: str | None, key: str, files: list[str], **options: Any) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    at = f" at revision {revision}" if revision else ""
    options |= {"allow_patterns": files, "ignore_patterns": SECOND_COPIES}
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **options))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"{key}: no folder {repo} here, and {repo}{at} is not to be had from the hub "
            f"({type(error).__name__}: {reason}); give a local folder, "
            "check the id and the revision, or run where the hub is reachable"
        ) from error


def _silent() -> type:
    """A progress bar that shows nothing: for files that take no time."""
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **{**options, "disable": True})

    return Silent
