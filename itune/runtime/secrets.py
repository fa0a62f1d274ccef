"""Secrets never reach a log: what looks like one is replaced."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"token|secret|password|passwd|api_?key|credential", re.IGNORECASE)
# tokens by their form: Hugging Face, GitHub, OpenAI and Anthropic, Google, and user:password in an address
_FORMS = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bsk-[A-Za-z0-9_-]{20,}|\bAIza[A-Za-z0-9_-]{30,}"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)
_HIDDEN = "[hidden]"


def redact(text: str) -> str:
    """`text` without the values of environment variables named like secrets, and without tokens of known forms."""
    for name, value in os.environ.items():
        if len(value) >= 8 and _NAMES.search(name):
            text = text.replace(value, _HIDDEN)
    return _FORMS.sub(_HIDDEN, text)
