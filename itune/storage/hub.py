"""Model folders of the Hugging Face hub on this machine: the files that are read, from one snapshot, in its cache."""

from __future__ import annotations

import fnmatch
import functools
import json
import re
from pathlib import Path
from typing import Any

from itune.types import InputError

# configuration, index of the weights, tokenizer (of any kind that transformers reads), chat templates
SMALL_FILES = ["*.json", "*.model", "*.jinja", "vocab.txt", "merges.txt"]
MODEL_FILES = ["*.safetensors", *SMALL_FILES]  # no pickles
# weights again in other layouts (Mistral's own is consolidated*, that of gpt-oss and Llama in original/), with their
# configurations; of other programs
UNREAD = [
    "consolidated*", "params.json", "*.bin.index.json", "trainer_state.json",
    *(f"*/{each}" for each in MODEL_FILES if each != "*.jinja"),
]  # fmt: skip
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # of peft


def is_read(name: str, weights: bool = True) -> bool:
    """Whether a file of a model folder is one that itune reads: configuration, tokenizer, or of the `weights`."""
    files = MODEL_FILES if weights else SMALL_FILES
    return any(fnmatch.fnmatchcase(name, each) for each in files) and not any(
        fnmatch.fnmatchcase(name, each) for each in UNREAD
    )


def is_hub_id(given: str) -> bool:
    """Whether this may be NAME or OWNER/NAME."""
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given)) and not given.startswith(".")


def hub_folder(repo: str, revision: str | None = None, key: str = "model.path", weights: bool = True) -> Path:
    """The snapshot of a hub id: what is not in the cache is downloaded. Without `weights`, the small files only.

    A process asks once which commit a revision is, so that weights and tokenizer are of the same. Raises InputError,
    naming the config `key`, where the hub lacks it, does not give it, or cannot be reached while the cache lacks it.
    """
    commit = _commit(repo, revision or None, key)
    small = _snapshot(repo, commit, key, SMALL_FILES)
    return _snapshot(repo, commit, key, SMALL_FILES + _weights(small, key)) if weights else small


@functools.lru_cache(maxsize=64)
def _commit(repo: str, revision: str | None, key: str) -> str:
    return _snapshot(repo, revision, key, SMALL_FILES).name


def _weights(folder: Path, key: str) -> list[str]:
    """The files with the weights, as the index names them: a folder may have others beside, in narrower dtypes."""
    if key != "model.path" and (folder / ADAPTER_CONFIG).is_file():
        return [ADAPTER]
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        return [name for name in names if name.endswith(".safetensors")] or [SINGLE]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):  # none, or a bad one: its reader says so
        return [SINGLE]


def _snapshot(repo: str, revision: str | None, key: str, files: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    options: dict[str, Any] = {"allow_patterns": files, "ignore_patterns": UNREAD}
    options |= {"tqdm_class": _silent()} if files is SMALL_FILES else {}
    try:
        return Path(huggingface_hub.snapshot_download(repo, revision=revision, **options))
    except Exception as error:  # also what httpx and the transfer raise, which share no class
        small = isinstance(error, LocalEntryNotFoundError) and files is SMALL_FILES
        if small and (found := _cached(repo, revision)):
            return found  # no network: what another program left there may do
        at = f" at revision {revision}" if revision else ""
        reason = (str(error).strip().splitlines() or [""])[0]
        raise InputError(
            f"{key}: no folder {repo} here, and {repo}{at} is not to be had from the hub "
            f"({type(error).__name__}: {reason}); {_advice(error, repo)}"
        ) from error


def _cached(repo: str, revision: str | None) -> Path | None:
    """The snapshot in the cache that has a configuration, though other files be missing."""
    import huggingface_hub

    for name in ("config.json", ADAPTER_CONFIG):
        found = huggingface_hub.try_to_load_from_cache(repo, name, revision=revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _advice(error: Exception, repo: str) -> str:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    login = "log in with `hf auth login` or set HF_TOKEN"
    if isinstance(error, GatedRepoError):
        return f"ask for access on its page, https://huggingface.co/{repo}, and {login}"
    if isinstance(error, RepositoryNotFoundError):
        return f"check the id; where it is private, {login}"
    return "give a local folder, check the id and the revision, or run where the hub is reachable"


def _silent() -> type:
    """A progress bar that shows nothing: for files that take no time."""
    from tqdm.auto import tqdm

    class Silent(tqdm):
        def __init__(self, *given: Any, **options: Any):
            super().__init__(*given, **{**options, "disable": True})

    return Silent
