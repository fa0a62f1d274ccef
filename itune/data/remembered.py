"""A tokenizer that is read only when text is: what a run needs of it before that is remembered from an earlier run.

Reading one imports transformers: most of a second, several with a large vocabulary. A run whose data are in the cache
then trains, and an evaluation that generates reads the tokenizer.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from itune.data.dataset import cache_folder
from itune.data.store import hash_of
from itune.data.templates import ChatTemplate, load_tokenizer
from itune.data.tokenizer import Tokenizer
from itune.storage.cache import code_digest
from itune.storage.fetch import model_folder
from itune.types import InputError
from itune.writers import write_atomically

TEMPLATE = ("source", "name", "variables", "with_tools")  # what a chat template is made of
READ = (".json", ".jinja", ".model", ".txt")  # suffixes of what a tokenizer is made of


def recall_tokenizer(path: str, chat_template: str = "", revision: str | None = None, cache_dir: str = "") -> Tokenizer:
    """`load_tokenizer(path, chat_template, revision)`, put off until more is asked than is remembered.

    What is remembered goes by the bytes of the folder's files and of the template's, by the libraries' releases and by
    our code, so it is what would be read.
    """

    folder = model_folder(path, revision, weights=False)

    def load() -> Tokenizer:
        return load_tokenizer(str(folder), chat_template)

    kept = cache_folder(cache_dir) / "tokenizers" / f"{_digest(folder, chat_template)}.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Remembered(json.loads(kept.read_text()), load)
    tokenizer = load()
    if tokenizer.template:
        with contextlib.suppress(OSError):  # without it the next run reads the tokenizer again
            write_atomically(kept, json.dumps(_facts(tokenizer)))
    return tokenizer


class Remembered(Tokenizer):
    """A Tokenizer of remembered facts. Any other attribute reads the tokenizer, once, and is then as it says.

    Raises InputError where what is read then is not what the facts were taken from.
    """

    def __init__(self, facts: dict[str, Any], load: Callable[[], Tokenizer]):
        self._load, self._lock = load, threading.RLock()
        # in the instance, where the class's cached property of the name is not asked
        self.__dict__.update(
            vocab_size=int(facts["vocab_size"]),
            fingerprint=str(facts["fingerprint"]),
            added_tokens=tuple(facts["added_tokens"]),
            _template={name: facts["template"][name] for name in TEMPLATE},
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name != "_source_stops":
            raise AttributeError(name)
        with self._lock:
            if name == "template" and "hf" not in self.__dict__:  # compiled when something is rendered
                return self.__dict__.setdefault(name, ChatTemplate(**self._template))
            if "hf" not in self.__dict__:
                read = self._load()
                if read.fingerprint != self.fingerprint:
                    raise InputError(
                        f"model.path: the tokenizer of {read.hf.name_or_path} changed since this run "
                        "began; put the former files back"
                    )
                self.__dict__.update(read.__dict__)
        return object.__getattribute__(self, name)


def _facts(tokenizer: Tokenizer) -> dict[str, Any]:
    template = tokenizer.template
    assert template is not None
    return {
        "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint,
        "added_tokens": tokenizer.added_tokens,
        "template": {name: getattr(template, name) for name in TEMPLATE},
    }  # fmt: skip


def _digest(folder: Path, chat_template: str) -> str:
    near = [*folder.glob("*"), *folder.glob("additional_chat_templates/*")]
    files = {file: file.read_bytes() for file in near if file.suffix in READ and file.is_file()}
    template = Path(chat_template).expanduser()
    if chat_template and template.is_file():
        files[template] = template.read_bytes()
    return hash_of({
        "code": code_digest(Path(__file__).parent), "template": chat_template,
        "releases": [importlib.metadata.version(name) for name in ("transformers", "tokenizers", "jinja2")],
        "files": {str(file): hashlib.sha256(data).hexdigest() for file, data in files.items()},
    })  # fmt: skip
