"""Secrets never reach a log: what looks like one is replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

_NAMES = re.compile(r"token(?!i[sz])|secret|password|passwd|api_?key|credential", re.IGNORECASE)  # of variables
# of keys, which are whole words: `token_counting` holds none
_KEYS = re.compile(
    r"(?:^|[\W_])(?:token|secret|password|passwd|api_?key|(?:access|secret)_key|credentials?)$", re.IGNORECASE)
_OF_THE_USER = "data"  # the section whose keys are names of the user's sources, categories and fields
# tokens by their form: Hugging Face, GitHub, OpenAI and Anthropic, Google, AWS, and user:password in an address
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bsk-[A-Za-z0-9_-]{20,}"
    r"|\bAIza[A-Za-z0-9_-]{30,}|\bAKIA[0-9A-Z]{16}\b|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_IN_QUERY = re.compile(r"""([?&][\w-]*(?:token|key|sig|signature|password)=)[^&\s"']+""", re.IGNORECASE)
_HIDDEN = "[hidden]"


def redact(text: str) -> str:
    """`text` without the values of environment variables named like secrets, and without tokens of known forms."""
    return _hide(text, _values())


def redact_tree(value: Any) -> Any:
    """A nested dict of plain values with `redact` on every text, and every text under a key named like a secret hidden.

    Keys below the section `data` are names of sources and fields, not of secrets: a run's config stays one that runs.
    Redact before JSON is made of it: JSON writes quotes and letters beyond ASCII in another way.
    """
    return _hide_tree(value, False, _values())


def _values() -> list[str]:
    return [value for name, value in os.environ.items() if len(value) >= 8 and _NAMES.search(name)]


def _hide(text: str, values: list[str]) -> str:
    if len(text) < 8:  # no secret is that short
        return text
    for value in values:
        text = text.replace(value, _HIDDEN)
    return _IN_QUERY.sub(rf"\1{_HIDDEN}", _FORMS.sub(_HIDDEN, text))


def _hide_tree(value: Any, secret: bool | None, values: list[str]) -> Any:
    """`secret`: whether a text here stands under a key named like one; None where keys are not judged."""
    if isinstance(value, Mapping):
        return {_hide(str(name), values): _hide_tree(item, _is_secret(str(name), secret), values)
                for name, item in value.items()}  # fmt: skip
    if isinstance(value, list | tuple):
        return [_hide_tree(item, secret, values) for item in value]
    if not isinstance(value, str):
        return value
    return _HIDDEN if secret and len(value) >= 8 else _hide(value, values)


def _is_secret(key: str, above: bool | None) -> bool | None:
    return None if above is None or key == _OF_THE_USER else bool(_KEYS.search(key))


class HidingStream:
    """A text stream that writes to another one what `change` makes of a text; all else is the other one's."""

    def __init__(self, stream: Any, change: Callable[[str], str] = redact) -> None:
        self._stream, self._change = stream, change

    def write(self, text: str) -> int:
        self._stream.write(self._change(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
