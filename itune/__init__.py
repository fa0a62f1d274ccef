"""itune: from a pretrained language model to one that follows instructions, in JAX."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> module; imported on first use, so that `import itune` costs nothing
_PUBLIC = {
    "load_pretrained": "itune.models",
    "forward": "itune.models",
    "export_pretrained": "itune.export",
    "render": "itune.data.render",
    "generate": "itune.decode",
    "load_config": "itune.config",
    "train": "itune.loop",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'itune' has no attribute {name!r}; it has {', '.join(__all__)}")
